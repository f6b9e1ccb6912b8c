"""Small tasks that need no download, shared by the benchmarks: data, models, how two runs are compared.

``digits`` is scikit-learn's 8x8 handwritten digits, ``text`` is the source code of Python's own standard library,
``models`` holds the networks, ``modules`` their LightningModules.
"""
