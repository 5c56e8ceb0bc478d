"""Lines of machine code with the control bits that a test wants."""


def line(op, args="", guard="", stall=1, writes=7, reads=7, waits=()) -> str:
    """An instruction as `nvdisasm -c -hex` prints it; see `sass` for its control bits."""
    bits = stall | writes << 5 | reads << 8 | sum(1 << i for i in waits) << 11
    text = f"{guard} {op} {args} ;" if guard else f"{op} {args} ;"
    return f"        /*0010*/  {text}  /* 0x0000000000000000 */\n        /* 0x{bits << 41:016x} */"
