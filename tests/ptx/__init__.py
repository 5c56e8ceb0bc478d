"""A PTX emulator in numpy: runs the PTX that Triton emits for sm_75 to sm_89 on a CPU, one CTA at a time.

`emulator.run` is the entry. All threads of a CTA step together, one numpy operation an instruction, so a
branch must be taken by all threads or none, and a missing `bar.sync` between two threads does not show. A
missing `cp.async.wait_group` does show: the copies land when they are waited for. Rounding is the ISA's where
it fixes one; approximate instructions (`ex2.approx` and its kind) give the correctly rounded value, and mma
with float operands rounds its sum once.
"""
