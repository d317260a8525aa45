"""The vLLM plug-in: what vLLM loads through its entry point `vllm.general_plugins`, and nothing else imports."""
