"""Correctness and speed on a CUDA device; ``benchmarks/on_gpu.py`` starts it.

A run is a list of sections (``plan.py``), a section a list of jobs, a job a small dictionary that gives one row. Jobs
run in processes of their own (``worker.py``): a kernel that hangs or kills its CUDA context costs one row, not the
run. The process that the user started (``run.py``) never touches the device; it hands out jobs and keeps the record.
"""
