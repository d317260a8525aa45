"""The entry point: vLLM calls `register` in each of its processes, before it reads a model's configuration."""

from __future__ import annotations

import logging

from qoq.formats.quantization_config import QUANT_METHOD
from qoq.recipes.families import all_families


def register() -> None:
    """Make vLLM know quant_method "qoq" and our attention, and keep our KV cache for models of the families we know.

    Calling it again changes nothing; no GPU is touched, no kernel imported.

    It never raises: vLLM would then serve no model at all wherever qoq is installed. What keeps our checkpoints from
    being served is logged instead, and vLLM refuses them by itself, as of an unknown method.
    """
    logger = logging.getLogger("vllm.qoq")  # below "vllm", whose handlers show it
    try:
        from qoq.kernels.vllm.cache import BACKEND
        from qoq.kernels.vllm.config import QoQConfig, prepare
        from qoq.kernels.vllm.interface import add_backend, add_config_hook, add_method, backend_path, known_method

        known = known_method(QUANT_METHOD)
        if known is None:
            add_method(QUANT_METHOD, QoQConfig)
        if known in {None, QoQConfig}:
            if backend_path() is None:
                add_backend(BACKEND)
            for family in all_families():
                add_config_hook(family.architecture, prepare)
    except (ImportError, AttributeError) as error:
        logger.error("qoq: this version of vLLM is not supported (%s); checkpoints of qoq cannot be served", error)
        return
    if known not in {None, QoQConfig}:
        logger.error("qoq: vLLM has another quantization method %r (%s); checkpoints go to it", QUANT_METHOD, known)
