"""The eviction node's bodies for GPUs: Triton kernels, each behind a ``triton_op`` that is traced.

Inductor sees through the op and puts the kernel into its own output code. Nothing here is imported
before a tensor on a GPU asks for it.
"""
