"""ChaCha keystream in registers, for kernels to apply right after a load or right before a store.

The counter's layout, and why no two elements share keystream, is in `scx_kernels/sealing.py`. A head's row of features
is n blocks of 64 bytes in the cipher's own order, so that on a CPU a library deciphers a run of rows in one call. One
thread computes one block. So that it also holds the data of that block, tiles are loaded and stored in *stripes*:
stripe j of a tile is bytes 16j..16j+15 of each of its blocks, a vector load a thread, and nothing changes threads. Put
together, the four stripes are the tile in its natural order.

Everything is unrolled: a loop in here would keep a caller's loop over keys from being pipelined.
"""

import triton
import triton.language as tl

from scx_kernels.kernels.launch import INTERPRET
from scx_kernels.sealing import COUNT_BITS, WRITE_LIMIT

__all__ = [
    "EMPTY",
    "block_words",
    "head_word",
    "load_key",
    "load_unsealed",
    "row_words",
    "seal",
    "stripe",
    "stripe_columns",
]

_COUNT_BITS = tl.constexpr(COUNT_BITS)
_WRITE_BITS = tl.constexpr(WRITE_LIMIT.bit_length() - 1)
_COUNT_MASK = tl.constexpr((1 << COUNT_BITS) - 1)


# The quarter round, RFC 8439, section 2.1: $0 to $3 are a, b, c, d afterwards, $4 to $7 before.
PTX_QUARTER_ROUND = tl.constexpr("""
    add.u32 $0, $4, $5; xor.b32 $3, $7, $0; shf.l.wrap.b32 $3, $3, $3, 16;
    add.u32 $2, $6, $3; xor.b32 $1, $5, $2; shf.l.wrap.b32 $1, $1, $1, 12;
    add.u32 $0, $0, $1; xor.b32 $3, $3, $0; shf.l.wrap.b32 $3, $3, $3, 8;
    add.u32 $2, $2, $3; xor.b32 $1, $1, $2; shf.l.wrap.b32 $1, $1, $1, 7;
""")
PTX_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r")
GCN_QUARTER_ROUND = tl.constexpr(
    """
    v_add_u32 $0, $4, $5; v_xor_b32 $3, $7, $0; v_alignbit_b32 $3, $3, $3, 16;
    v_add_u32 $2, $6, $3; v_xor_b32 $1, $5, $2; v_alignbit_b32 $1, $1, $1, 20;
    v_add_u32 $0, $0, $1; v_xor_b32 $3, $3, $0; v_alignbit_b32 $3, $3, $3, 24;
    v_add_u32 $2, $2, $3; v_xor_b32 $1, $1, $2; v_alignbit_b32 $1, $1, $1, 25;
""".replace(";", "\n")
)
GCN_REGISTERS = tl.constexpr("=&v,=&v,=&v,=&v,v,v,v,v")
# What stands for a write number where there is no row: its keystream is zero.
EMPTY = tl.constexpr(WRITE_LIMIT)


@triton.jit
def head_word(layer, head):
    """Word 14."""
    return ((head.to(tl.uint32) << 16) | layer.to(tl.uint32)).to(tl.uint32)


@triton.jit
def load_key(key_ptr):
    """The eight words of an int32 (8,) key: a tuple of uint32 scalars."""
    return (
        tl.load(key_ptr).to(tl.uint32, bitcast=True),
        tl.load(key_ptr + 1).to(tl.uint32, bitcast=True),
        tl.load(key_ptr + 2).to(tl.uint32, bitcast=True),
        tl.load(key_ptr + 3).to(tl.uint32, bitcast=True),
        tl.load(key_ptr + 4).to(tl.uint32, bitcast=True),
        tl.load(key_ptr + 5).to(tl.uint32, bitcast=True),
        tl.load(key_ptr + 6).to(tl.uint32, bitcast=True),
        tl.load(key_ptr + 7).to(tl.uint32, bitcast=True),
    )


@tl.core.builtin
def _backend(_semantic=None):
    """What is compiled for, "cuda" or "hip"; it need not be a machine that is here."""
    return tl.constexpr(_semantic.builder.options.backend_name)


@triton.jit
def _rotate(x, BITS: tl.constexpr):
    return (x << BITS) | (x >> (32 - BITS))


@triton.jit
def _quarter_round(a, b, c, d):
    if INTERPRET:
        a = a + b
        d = _rotate(d ^ a, 16)
        c = c + d
        b = _rotate(b ^ c, 12)
        a = a + b
        d = _rotate(d ^ a, 8)
        c = c + d
        b = _rotate(b ^ c, 7)
    else:
        # One operation instead of twenty: Triton's analyses of a loop take time by the square of what is in it.
        ASM: tl.constexpr = GCN_QUARTER_ROUND if _backend() == "hip" else PTX_QUARTER_ROUND
        REGISTERS: tl.constexpr = GCN_REGISTERS if _backend() == "hip" else PTX_REGISTERS
        a, b, c, d = tl.inline_asm_elementwise(
            ASM, REGISTERS, [a, b, c, d], dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    return a, b, c, d


@triton.jit
def _columns(x):
    """One round on the columns of the state."""
    x0, x4, x8, x12 = _quarter_round(x[0], x[4], x[8], x[12])
    x1, x5, x9, x13 = _quarter_round(x[1], x[5], x[9], x[13])
    x2, x6, x10, x14 = _quarter_round(x[2], x[6], x[10], x[14])
    x3, x7, x11, x15 = _quarter_round(x[3], x[7], x[11], x[15])
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def _diagonals(x):
    """One round on the diagonals of the state."""
    x0, x5, x10, x15 = _quarter_round(x[0], x[5], x[10], x[15])
    x1, x6, x11, x12 = _quarter_round(x[1], x[6], x[11], x[12])
    x2, x7, x8, x13 = _quarter_round(x[2], x[7], x[8], x[13])
    x3, x4, x9, x14 = _quarter_round(x[3], x[4], x[9], x[14])
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def block_words(key, word12, word13, word14, word15, ROUNDS: tl.constexpr):
    """The sixteen words, a tuple, of a block for every element of word12; all uint32.

    Words 13 to 15 may be scalars or have fewer elements: the first round works on each column of the state in the shape
    that this column has, so what is common to a tile is done once.
    """
    # A Python integer would be signed here, and make every sum with it signed.
    c0 = tl.full((), 0x61707865, tl.uint32)
    c1 = tl.full((), 0x3320646E, tl.uint32)
    c2 = tl.full((), 0x79622D32, tl.uint32)
    c3 = tl.full((), 0x6B206574, tl.uint32)
    k0, k1, k2, k3, k4, k5, k6, k7 = key
    x = (c0, c1, c2, c3, k0, k1, k2, k3, k4, k5, k6, k7, word12, word13, word14, word15)
    for _ in tl.static_range(ROUNDS // 2):
        x = _diagonals(_columns(x))
    return (
        x[0] + c0, x[1] + c1, x[2] + c2, x[3] + c3, x[4] + k0, x[5] + k1, x[6] + k2, x[7] + k3, x[8] + k4, x[9] + k5,
        x[10] + k6, x[11] + k7, x[12] + word12, x[13] + word13, x[14] + word14, x[15] + word15,
    )  # fmt: skip


@triton.jit
def row_words(key, writes, block, word14, word15, BLOCKS: tl.constexpr, ROUNDS: tl.constexpr):
    """The sixteen words of block `block` of rows written as `writes` (int64); the two broadcast to the result's shape.
    Rows are BLOCKS blocks long."""
    word12 = (writes & _COUNT_MASK).to(tl.uint32) * BLOCKS + block.to(tl.uint32)
    word13 = (writes >> _COUNT_BITS).to(tl.uint32)
    return block_words(key, word12.to(tl.uint32), word13, word14, word15, ROUNDS)


@triton.jit
def _kept(word, keep):
    if keep is not None:
        word = word & keep
    return word


@triton.jit
def stripe(words, keep, PLACE: tl.constexpr, BITS: tl.constexpr):
    """(rows, blocks) words -> (rows, blocks * 128 / BITS) unsigned integers: stripe PLACE (0 to 3) of the blocks.

    keep: (rows, 1) uint32, all ones, or zero where the keystream shall be zero; None keeps all. It costs nothing: "and"
    and the XOR that follows are one instruction.
    """
    ROWS: tl.constexpr = words[0].shape[0]
    BLOCKS: tl.constexpr = words[0].shape[1]
    # A join adds the lowest bit of the place, so the last one sets even and odd words side by side.
    even = tl.join(_kept(words[4 * PLACE], keep), _kept(words[4 * PLACE + 2], keep))
    odd = tl.join(_kept(words[4 * PLACE + 1], keep), _kept(words[4 * PLACE + 3], keep))
    taken = tl.reshape(tl.join(even, odd), (ROWS, 4 * BLOCKS))
    if BITS == 16:
        halves = tl.join(taken.to(tl.uint16), (taken >> 16).to(tl.uint16))
        taken = tl.reshape(halves, (ROWS, 8 * BLOCKS))
    return taken


@triton.jit
def stripe_columns(PLACE: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr):
    """(BLOCKS * 128 / BITS,) int32: the columns of stripe PLACE in a tile of BLOCKS blocks."""
    VECTOR: tl.constexpr = 128 // BITS
    place = tl.arange(0, BLOCKS * VECTOR)
    return place // VECTOR * (4 * VECTOR) + place % VECTOR + PLACE * VECTOR


@triton.jit
def _joined(first, second, third, fourth, STRIPES: tl.constexpr, VECTOR: tl.constexpr):
    """Stripes (rows, columns) of a tile -> the tile; STRIPES of 2: half a block, the last two are not used."""
    ROWS: tl.constexpr = first.shape[0]
    COLUMNS: tl.constexpr = first.shape[1]
    if STRIPES == 2:
        joined = tl.trans(tl.join(first, second), 0, 2, 1)
    else:
        joined = tl.join(tl.join(first, third), tl.join(second, fourth))
        joined = tl.trans(tl.reshape(joined, (ROWS, COLUMNS // VECTOR, VECTOR, 4)), 0, 1, 3, 2)
    return tl.reshape(joined, (ROWS, STRIPES * COLUMNS))


@triton.jit
def _tile_words(
    key, writes, word14, IS_VALUE: tl.constexpr, HEAD_DIM: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Sixteen (rows, blocks) words: the blocks that hold features START..START+WIDTH-1."""
    PER_BLOCK: tl.constexpr = 512 // BITS
    tl.static_assert(START % 16 == 0, "START: expected a multiple of 16")
    tl.static_assert(START % PER_BLOCK == 0 or START % PER_BLOCK + WIDTH <= PER_BLOCK, "START: leaves its block")
    block = tl.arange(0, max(WIDTH // PER_BLOCK, 1)) + START // PER_BLOCK
    BLOCKS: tl.constexpr = (HEAD_DIM * BITS + 511) // 512
    word15 = tl.full((), BLOCKS - 1 + (16 if IS_VALUE else 0), tl.uint32)
    return row_words(key, writes[:, None], block[None, :], word14, word15, BLOCKS, ROUNDS)


@triton.jit
def _load_stripe(
    rows, words, mask, keep, stride, PLACE: tl.constexpr, HEAD_DIM: tl.constexpr, START: tl.constexpr,
    FIRST: tl.constexpr, IS_FULL: tl.constexpr, NARROW: tl.constexpr, INT64: tl.constexpr, UINT: tl.constexpr,
):  # fmt: skip
    """Stripe FIRST + PLACE of the tile's blocks, unsealed."""
    BITS: tl.constexpr = UINT.primitive_bitwidth
    bits = stripe(words, keep, FIRST + PLACE, BITS)
    columns = stripe_columns(PLACE, words[0].shape[1], BITS) + START
    if INT64:
        columns = columns.to(tl.int64)
    pointers = rows[:, None] + columns[None, :] * stride
    if IS_FULL and not NARROW:
        x = tl.load(pointers)
    else:
        inside = mask[:, None]
        if NARROW:
            inside = inside & (columns < HEAD_DIM)[None, :]
            bits = tl.where((columns < HEAD_DIM)[None, :], bits, 0)
        x = tl.load(pointers, mask=inside, other=0)
    return (x.to(UINT, bitcast=True) ^ bits.to(UINT)).to(x.dtype, bitcast=True)


@triton.jit
def load_unsealed(
    rows, stride, mask, key, writes, word14, IS_VALUE: tl.constexpr, HEAD_DIM: tl.constexpr, START: tl.constexpr,
    WIDTH: tl.constexpr, IS_FULL: tl.constexpr, INT64: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """(rows, WIDTH): features START..START+WIDTH-1 of sealed rows, unsealed; zero past HEAD_DIM and, unless IS_FULL,
    outside mask.

    rows: pointers. writes: their numbers, loaded with EMPTY outside mask. START is a multiple of 16, and of a block's
    features unless the tile lies within a block; WIDTH is a power of two. Loaded stripe by stripe, each an asynchronous
    copy where the compiler pipelines the caller's loop, and joined only then: a tile that was loaded whole would meet
    its keystream in another layout, dozens of barriers later.
    """
    BITS: tl.constexpr = rows.dtype.element_ty.primitive_bitwidth
    UINT: tl.constexpr = tl.uint16 if BITS == 16 else tl.uint32
    VECTOR: tl.constexpr = 128 // BITS
    STRIPES: tl.constexpr = min(WIDTH // VECTOR, 4)
    FIRST: tl.constexpr = START // VECTOR % 4
    NARROW: tl.constexpr = START + WIDTH > HEAD_DIM
    words = _tile_words(key, writes, word14, IS_VALUE, HEAD_DIM, START, WIDTH, BITS, ROUNDS)
    keep = None
    if not IS_FULL:
        # Arithmetic on a loaded number: of a comparison the compiler would make a selection of each element.
        keep = ((writes >> _WRITE_BITS) - 1).to(tl.uint32)[:, None]
    a = _load_stripe(rows, words, mask, keep, stride, 0, HEAD_DIM, START, FIRST, IS_FULL, NARROW, INT64, UINT)
    b = _load_stripe(rows, words, mask, keep, stride, 1, HEAD_DIM, START, FIRST, IS_FULL, NARROW, INT64, UINT)
    c = a
    d = b
    if STRIPES == 4:
        c = _load_stripe(rows, words, mask, keep, stride, 2, HEAD_DIM, START, FIRST, IS_FULL, NARROW, INT64, UINT)
        d = _load_stripe(rows, words, mask, keep, stride, 3, HEAD_DIM, START, FIRST, IS_FULL, NARROW, INT64, UINT)
    return _joined(a, b, c, d, STRIPES, VECTOR)


@triton.jit
def seal(
    x, key, writes, word14, IS_VALUE: tl.constexpr, HEAD_DIM: tl.constexpr, START: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """A tile (rows, columns) of features START.., in the dtype in which it is stored -> what is stored.

    Features from HEAD_DIM on would get keystream of another row: they are never stored.
    """
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    UINT: tl.constexpr = tl.uint16 if BITS == 16 else tl.uint32
    VECTOR: tl.constexpr = 128 // BITS
    STRIPES: tl.constexpr = min(x.shape[1] // VECTOR, 4)
    FIRST: tl.constexpr = START // VECTOR % 4
    words = _tile_words(key, writes, word14, IS_VALUE, HEAD_DIM, START, x.shape[1], BITS, ROUNDS)
    a = stripe(words, None, FIRST, BITS)
    b = stripe(words, None, FIRST + 1, BITS)
    c = a
    d = b
    if STRIPES == 4:
        c = stripe(words, None, FIRST + 2, BITS)
        d = stripe(words, None, FIRST + 3, BITS)
    bits = _joined(a, b, c, d, STRIPES, VECTOR)
    return (x.to(UINT, bitcast=True) ^ bits.to(UINT)).to(x.dtype, bitcast=True)
