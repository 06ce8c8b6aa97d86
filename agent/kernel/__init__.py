"""Kernel interfaces, one file a system-call family. No policy here: what the kernel offers, typed, with its errors named."""
