"""The kinds of CPU that the C kernels are tested as: those that this one is, and some that it is not."""

from baton_kernels.cpu.build import Level, supported_levels

BEST = supported_levels()[0]


def emulated(name: str, without: str, definition: str) -> Level:
    """The best level that this CPU can run `without` a feature, which C emulates where that is defined."""
    level = next(level for level in supported_levels() if without not in level.needs)
    return Level(name, level.needs, (*level.flags, f"-D{definition}"))


# What a CPU that multiplies bfloat16 runs, but for that one instruction.
PAIRS = emulated("bfloat16-pairs", "avx512_bf16", "EMULATE_BFLOAT16_PRODUCTS")
# What a CPU with AMX runs, but for its tiles, whose loads no sanitizer sees.
EMULATED_AMX = emulated("emulated-amx", "amx_tile", "EMULATE_AMX")

# What runs where no instruction set is known, as on Arm.
ANY = Level("any-cpu", (), ("-U__SSE2__",))
