"""Triton kernels, imported as `nexus_ext.kernels`: a leaf that knows torch and triton only.

The folder `kernels/` above has no `__init__.py`: as a namespace it cannot shadow the package of
the same name that Hugging Face publishes.
"""
