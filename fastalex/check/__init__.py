"""`fastalex check`: does it work on this GPU, and what is gained?

Needs torch, triton and numpy alone.  `runner` gives each stage a process of its own and keeps what comes out line by
line; `kernels`, `convolutions`, `models` and `machine` say what is checked and timed; `report` makes tables of it.
"""
