"""The study: each claim of the project measured, one module per part. `python -m bench.study --help`"""
