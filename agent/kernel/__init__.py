"""Kernel interfaces, one file a system-call family. No policy: what the kernel offers, typed, errors named."""
