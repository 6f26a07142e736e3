"""NVIDIA GPUs: flash attention over pages, fused elementwise kernels, 8- and 4-bit products, decodes as CUDA graphs.

Every module here imports without CUDA and without Triton; what needs them is looked for when a backend is made.
"""
