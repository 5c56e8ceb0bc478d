"""What can go wrong in emulated code. An instruction outside the emulator raises NotImplementedError
instead."""


class EmulationError(RuntimeError):
    """The code does something whose result the ISA leaves undefined, or that a GPU would stop at."""


class MemoryFault(EmulationError):
    """An access outside every buffer, misaligned, or to memory that may not be written."""


class DivergentBranch(EmulationError):
    """A branch or return that only some threads take."""


class UndefinedRegister(EmulationError):
    """A register read before any write to it."""
