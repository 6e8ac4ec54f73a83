"""Kernels in C: what torch does on a CPU in many passes over memory, in one."""
