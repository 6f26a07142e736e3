"""The arithmetic of a decoder: one protocol, a plain torch implementation, one in C for CPUs, one for CUDA.

Importing the package imports no torch, so that the kernels can be compiled while torch is imported.
"""
