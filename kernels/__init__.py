"""Triton kernels; react_fast.ops calls them, nothing else should. Importing a kernel file imports triton."""
