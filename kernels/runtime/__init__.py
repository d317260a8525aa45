"""A small runtime: a closed set of requests on one device, for verification, evaluation and measurement.

It is no server. From the outside in:

    engine      requests in, tokens and their times out; a step is planned while the device runs the one before
    scheduler   which sequences run in a step, on which rows and pages; page_pool owns the pages
    steps       what a step must know, sent to the device in one copy
    graphs      decode steps as CUDA graphs
    decoder     embedding, layers, logits; sampling draws tokens from them
    linears, attention   the operations that differ: CUDA kernels, PyTorch's, or the reference arithmetic
    config, weights, memory   what a model is, where its tensors come from, what fits

Scheduler, pages, steps and layers are the same code on a GPU and on the CPU, where the reference arithmetic computes.
"""
