"""Register tiles: what the operations of `simd_llvm` are made from, so that they take vectors, tiles of vectors, or both.

A tile has rows x columns of vectors of one type. Operations broadcast as NumPy does: 4 x 1 with 1 x 3 gives 4 x 3. A vector
counts as 1 x 1. The shape is a part of the type, and its numbers must be constants. LLVM sees an array value, which it
replaces by registers. numba's time to compile grows with the number of statements: one on a tile takes the place of dozens.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, register_model

from edgemistral.kernels.lowering import I8, I32, call, choose_reading, shuffle
from edgemistral.kernels.vector_types import Vector, i8x64, to_all_lanes


class Tile(types.Type):
    """A numba type for rows x cols vectors."""

    def __init__(self, vector: Vector, rows: int, cols: int) -> None:
        self.vector, self.rows, self.cols = vector, rows, cols
        self.llvm = ir.ArrayType(vector.llvm, rows * cols)
        super().__init__(f"{vector.name}[{rows}, {cols}]")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.llvm)


tile_type = cache(Tile)


class Words(Tile):
    """A tile in memory: each vector is loaded where it is used, 4 bytes to all of its lanes.

    Loaded earlier, all at once, the vectors take registers that sums need (2 % of prefill).
    """

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__(i8x64, rows, cols)
        self.name = f"words[{rows}, {cols}]"


@register_model(Words)
class _WordsModel(models.StructModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, [("first", types.voidptr), ("down", types.intp), ("right", types.intp)])


words_type = cache(Words)


def _places(rows, cols):
    """Row and column of every vector of a tile, as they lie in it."""
    return [(row, col) for row in range(rows) for col in range(cols)]


def _at(builder, kind, value, row, col):
    """The vector of a tile at this place of the result; a tile with one row or column, and what is no tile, is repeated."""
    if not isinstance(kind, Tile):
        return value
    row, col = row if kind.rows > 1 else 0, col if kind.cols > 1 else 0
    if not isinstance(kind, Words):
        return builder.extract_value(value, row * kind.cols + col)
    first, down, right = (builder.extract_value(value, n) for n in range(3))
    pointer = builder.gep(first, [_index(builder, ir.Constant(down.type, 0), down, right, row, col)])
    word = builder.load(builder.bitcast(pointer, I32.as_pointer()), align=1)
    return to_all_lanes(builder, word)


def _vectors(builder, kind, value):
    """All vectors of a tile, row by row."""
    return [_at(builder, kind, value, row, col) for row, col in _places(kind.rows, kind.cols)]


def _collect(builder, tile, make):
    """The tile of make(row, col)."""
    result = ir.Constant(tile.llvm, ir.Undefined)
    for n, (row, col) in enumerate(_places(tile.rows, tile.cols)):
        result = builder.insert_value(result, make(row, col), n)
    return result


def _constant(size):
    if not isinstance(size, types.IntegerLiteral):
        raise TypingError("the shape of a tile must be constant")
    return size.literal_value


# ---- lane by lane --------------------------------------------------------------------------------------------------

def _named(emit_values, names, types_of, emit, **options):
    """An intrinsic of these parameters: numba reads their names, so they cannot be *args."""
    scope = {"types_of": types_of, "emit": emit}
    name, names = emit_values.__name__, ", ".join(names)
    exec(f"def {name}(typingctx{', ' if names else ''}{names}):\n    return types_of({names}), emit", scope)
    function = scope[name]
    function.__doc__ = emit_values.__doc__
    return intrinsic(**options)(function) if options else intrinsic(function)


def operation(result, *arguments):
    """Make an intrinsic of the given types, or of tiles of them, from a function (builder, *values) -> value."""
    def types_of(*given):
        tiles = [kind for kind in given if isinstance(kind, Tile)]
        if not tiles:
            return result(*arguments)
        shape = [_broadcast({getattr(tile, side) for tile in tiles}) for side in ("rows", "cols")]
        accepted = [kind if isinstance(kind, Tile) and kind.vector == wanted else wanted
                    for kind, wanted in zip(given, arguments, strict=True)]
        return tile_type(result, *shape)(*accepted)

    def make(emit_values):
        def emit(context, builder, sig, args):
            if not isinstance(sig.return_type, Tile):
                return emit_values(builder, *args)
            return _collect(builder, sig.return_type, lambda row, col: emit_values(
                builder, *(_at(builder, kind, value, row, col) for kind, value in zip(sig.args, args, strict=True))))
        return _named(emit_values, [f"a{n}" for n in range(len(arguments))], types_of, emit)
    return make


def _broadcast(sizes):
    sizes = sizes - {1} or {1}
    if len(sizes) > 1:
        raise TypingError(f"tiles of {' and '.join(map(str, sorted(sizes)))} rows or columns do not meet")
    return sizes.pop()


def fold(result, argument):
    """Make an intrinsic from (builder, vectors) -> value that takes all vectors of a tile, row by row, or one vector."""
    def make(emit_values):
        def emit(context, builder, sig, args):
            kind = sig.args[0]
            return emit_values(builder, _vectors(builder, kind, args[0]) if isinstance(kind, Tile) else [args[0]])
        return _named(emit_values, ["a"], lambda kind: result(kind if isinstance(kind, Tile) else argument), emit)
    return make


def _rows(builder, kind, value):
    return [[_at(builder, kind, value, row, col) for col in range(kind.cols)] for row in range(kind.rows)]


def fold_rows(vector):
    """Make an intrinsic from (builder, rows of vectors) -> vector that takes a tile; its rows must be a power of two."""
    def make(emit_values):
        def emit(context, builder, sig, args):
            return emit_values(builder, _rows(builder, sig.args[0], args[0]))
        return _named(emit_values, ["tile"], lambda kind: vector(kind), emit)
    return make


def sum_rows(emit_values):
    """Make an intrinsic from (builder, vectors of a row) -> vector that makes of a tile one of a single column."""
    def emit(context, builder, sig, args):
        rows = _rows(builder, sig.args[0], args[0])
        return _collect(builder, sig.return_type, lambda row, _: emit_values(builder, rows[row]))
    return _named(emit_values, ["tile"], lambda kind: tile_type(kind.vector, kind.rows, 1)(kind), emit)


@intrinsic(prefer_literal=True)
def to_rows(typingctx, vector, rows):
    """A tile of one column whose row r is lane r of the vector, in all lanes."""
    def emit(context, builder, sig, args):
        return _collect(builder, sig.return_type, lambda row, _: shuffle(builder, args[0], None, [row] * vector.llvm.count))
    return tile_type(vector, _constant(rows), 1)(vector, rows), emit


def constant_tile(vector):
    """Make an intrinsic (rows, cols) from a function (builder, place) -> value; places are counted row by row."""
    def make(emit_values):
        def emit(context, builder, sig, args):
            tile = sig.return_type
            return _collect(builder, tile, lambda row, col: emit_values(builder, row * tile.cols + col))
        return _named(emit_values, ["rows", "cols"],
                      lambda rows, cols: tile_type(vector, _constant(rows), _constant(cols))(rows, cols),
                      emit, prefer_literal=True)
    return make


# ---- memory --------------------------------------------------------------------------------------------------------

def address(context, builder, base_type, base, index, llvm):
    """A pointer to element `index` of an array, or to byte `index` behind an address."""
    if isinstance(base_type, types.Integer):
        data = builder.inttoptr(base, I8.as_pointer())
    else:
        data = context.make_array(base_type)(context, builder, base).data
    return builder.bitcast(builder.gep(data, [index]), llvm.as_pointer())


def base_type(base):
    """The type in a signature of what is loaded from or stored to: an array, or an address."""
    return types.int64 if isinstance(base, types.Integer) else base


def load_of(memory, result, convert=lambda builder, value: value):
    @intrinsic
    def load(typingctx, array, index):
        def emit(context, builder, sig, args):
            return convert(builder, builder.load(address(context, builder, sig.args[0], *args, memory), align=1))
        return result(base_type(array), types.intp), emit
    return load


def store_of(memory, value_type, convert=lambda builder, value: value):
    @intrinsic
    def store(typingctx, array, index, value):
        def emit(context, builder, sig, args):
            pointer = address(context, builder, sig.args[0], args[0], args[1], memory)
            builder.store(convert(builder, args[2]), pointer, align=1)
            return context.get_dummy_value()
        return types.void(base_type(array), types.intp, value_type), emit
    return store


def spread_of(element, count, value_type, convert):
    """A store of a vector, converted and cut into `count` elements, to array[index + stride * n]; strides as indices are."""
    @intrinsic
    def store(typingctx, array, index, stride, value):
        def emit(context, builder, sig, args):
            pieces = builder.bitcast(convert(builder, args[3]), ir.VectorType(element, count))
            at = args[1]
            for n in range(count):
                piece = builder.extract_element(pieces, ir.Constant(I32, n))
                builder.store(piece, address(context, builder, sig.args[0], args[0], at, element), align=1)
                at = builder.add(at, args[2])
            return context.get_dummy_value()
        return types.void(base_type(array), types.intp, types.intp, value_type), emit
    return store


def _index(builder, index, down, right, row, col):
    """index + down * row + right * col."""
    for stride, n in ((down, row), (right, col)):
        if n:
            index = builder.add(index, builder.mul(stride, ir.Constant(stride.type, n)))
    return index


@intrinsic(prefer_literal=True)
def tile(typingctx, load, base, index, rows, cols, down, right):
    """The tile whose vector (row, col) is load(base, index + down * row + right * col)."""
    one = typingctx.resolve_function_type(load, (base_type(base), types.intp), {})

    def emit(context, builder, sig, args):
        _, base, index, _, _, down, right = args
        function = context.get_function(load, one)
        return _collect(builder, sig.return_type, lambda row, col: function(
            builder, [base, _index(builder, index, down, right, row, col)]))
    result = tile_type(one.return_type, _constant(rows), _constant(cols))
    return result(load, base_type(base), types.intp, rows, cols, types.intp, types.intp), emit


@intrinsic(prefer_literal=True)
def words(typingctx, base, index, rows, cols, down, right):
    """`tile(broadcast4, ...)`, whose vectors are loaded where they are used, from an array of bytes or an address."""
    def emit(context, builder, sig, args):
        base, index, _, _, down, right = args
        parts = cgutils.create_struct_proxy(sig.return_type)(context, builder)
        parts.first, parts.down, parts.right = address(context, builder, sig.args[0], base, index, I8), down, right
        return parts._getvalue()
    return words_type(_constant(rows), _constant(cols))(base_type(base), types.intp, rows, cols, types.intp, types.intp), emit


@intrinsic
def store_tile(typingctx, store, base, index, down, right, value):
    """store(base, index + down * row + right * col, vector) of every vector of a tile."""
    one = typingctx.resolve_function_type(store, (base_type(base), types.intp, value.vector), {})

    def emit(context, builder, sig, args):
        _, base, index, down, right, tile = args
        function = context.get_function(store, one)
        for (row, col), vector in zip(_places(value.rows, value.cols), _vectors(builder, value, tile), strict=True):
            function(builder, [base, _index(builder, index, down, right, row, col), vector])
        return context.get_dummy_value()
    return types.void(store, base_type(base), types.intp, types.intp, types.intp, value), emit


def _ask_for(context, builder, base_type, base, index, level):
    """A prefetch of one line into a level of the cache."""
    read, locality, data = (ir.Constant(I32, n) for n in (0, 4 - level, 1))
    pointer = address(context, builder, base_type, base, index, I8)
    return call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, locality, data)


@intrinsic(prefer_literal=True)
def prefetch_tile(typingctx, array, index, rows, cols, down, right):
    """Ask for the cache line of array[index + down * row + right * col], for every row and column; never faults."""
    return _prefetch_tile(array, rows, cols, 1)


@intrinsic(prefer_literal=True)
def prefetch_tile_early(typingctx, array, index, rows, cols, down, right):
    """The same for lines that are needed much later: into the cache that this host prefers (`lowering.READING`)."""
    return _prefetch_tile(array, rows, cols, choose_reading().level)


def _prefetch_tile(array, rows, cols, level):
    sizes = _constant(rows), _constant(cols)

    def emit(context, builder, sig, args):
        base, index, _, _, down, right = args
        for row, col in _places(*sizes):
            _ask_for(context, builder, sig.args[0], base, _index(builder, index, down, right, row, col), level)
        return context.get_dummy_value()
    return types.void(base_type(array), types.intp, rows, cols, types.intp, types.intp), emit
