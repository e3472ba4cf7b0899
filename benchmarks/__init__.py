"""Benchmarks that anyone can run; see README.md."""

import os

# Before torch is first imported: its memory profiler talks of GPUs that it does not find.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
