"""The CPU's convolution kernels as LLVM IR; `cpu_kernels.py` compiles and calls them.

Three entry points, each called by every thread with the same arguments, an array of 64-bit numbers and addresses whose
first is a counter from which threads draw their tasks:

    convolve         out[o] = sum over pairs (i, o, k) of x[i] @ w[k]; a task is a tile of output rows
    weight_gradient  dw[k] = sum over pairs (i, o, k) of x[i]^T g[o]; a task is an offset and a block of input channels
    transpose        out[k] = w[k]^T; a task is an offset and a row of blocks

At the heart of the first two is a tile of registers, `rows` by some vectors, that stays where it is while a loop
multiplies and adds into it. Rows are read where they lie: nothing is gathered first, and no product is stored. Every
sum runs in one order, whatever the number of threads and the width of the vectors, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slidr.sparse.cpu_code import Code

# Arguments of the entry points, in their order.
_SHARED = ["panel_columns", "panel_kinds", "panels"]
CONVOLVE = ["counter", "tasks", "x", "w", "out", "input_rows", "output_rows", "bounds", "channels", "columns"]
CONVOLVE += ["offsets", "tile_rows", "rows", *_SHARED]
WEIGHT_GRADIENT = ["counter", "tasks", "x", "g", "dw", "input_rows", "output_rows", "bounds", "channels", "columns"]
WEIGHT_GRADIENT += ["block", "blocks", "chunk", *_SHARED]
TRANSPOSE = ["counter", "tasks", "w", "out", "channels", "columns", "blocks"]
_ADDRESSES = {"x", "w", "out", "g", "dw", "input_rows", "output_rows", "bounds", "panel_columns", "panel_kinds"}
_UNROLL = 4  # channels a turn of the inner loop
BLOCK = 8  # rows and columns of what is transposed in registers


@dataclass(frozen=True)
class Shape:
    """Of the register tile: `rows` by at most `vectors` vectors of `width` floats. `rows` divides 8."""

    width: int
    vectors: int
    rows: int

    @property
    def kinds(self) -> list[tuple[int, int]]:
        """(vectors, their width) of every panel that columns, a multiple of 8, are cut into."""
        rest = [(1, 8)] if self.width == 16 else []
        return [(count, self.width) for count in range(1, self.vectors + 1)] + rest


AVX512, AVX2, NEON = Shape(16, 3, 8), Shape(8, 3, 4), Shape(4, 3, 8)


def panels(columns: int, shape: Shape) -> list[tuple[int, int]]:
    """(first column, kind) of the panels that `columns`, a multiple of 8, are cut into; no panel is left much narrower
    than its neighbour where that can be helped."""
    cut, at, vectors = [], 0, columns // shape.width
    while vectors > 0:
        count = min(shape.vectors, vectors)
        if vectors == shape.vectors + 1 > 2:
            count = vectors // 2
        cut.append((at, shape.kinds.index((count, shape.width))))
        at, vectors = at + count * shape.width, vectors - count
    if at < columns:
        cut.append((at, shape.kinds.index((1, 8))))
    return cut


def module(shape: Shape) -> str:
    """The text of a module with all entry points."""
    return "\n".join(
        [_panel(count, width, shape.rows) for count, width in shape.kinds]
        + [_outer(count, width, shape.rows) for count, width in shape.kinds]
        + [_convolve(shape), _weight_gradient(shape), _transpose()]
        + [_declared_fma(width) for width in sorted({width for _, width in shape.kinds})]
        + ["declare i64 @llvm.umin.i64(i64, i64)", "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)"]
        # Without it LLVM halves wide vectors on processors that it takes for slow at them.
        + ['attributes #0 = { nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }\n']
    )


def _declared_fma(width: int) -> str:
    kind = f"<{width} x float>"
    return f"declare {kind} @llvm.fma.v{width}f32({kind}, {kind}, {kind})"


def _panel(vectors: int, width: int, rows: int) -> str:
    """out[o, :n] += x[i] @ w[:, :n] for the pairs first..last of one offset, n = vectors * width columns.

    `rows` pairs a turn, or half of them where no more are left. What a turn has too many repeats the last pair and adds
    to a row that nobody reads.
    """
    code = Code(
        f"define internal void @panel_{vectors}_{width}(ptr noalias %x, ptr noalias %w, ptr noalias %out, "
        "ptr noalias %input_rows, ptr noalias %output_rows, i64 %first, i64 %last, i64 %channels, i64 %columns, "
        "ptr noalias %nobody)",
        width,
    )
    final, half = code.sub("%last", 1), rows // 2
    with code.loop("%first", "%last") as pair:
        many = code.less(half, code.sub("%last", pair.index))
        code.either(
            many,
            lambda: _turn(code, pair.index, final, vectors, rows),
            lambda: _turn(code, pair.index, final, vectors, half),
        )
        pair.step = code.select(many, rows, half)
    return code.end()


def _turn(code: Code, first: str, final: str, vectors: int, rows: int) -> None:
    real, places, inputs = [], [], []
    for r in range(rows):
        place = code.add(first, r)
        real.append(code.less(place, "%last"))
        places.append(code.select(real[r], place, final))
        inputs.append(_row(code, "%x", "%input_rows", places[r], "%channels"))
    with code.loop(0, "%channels", _UNROLL, zeros=rows * vectors) as channel:
        sums = channel.values
        for u in range(_UNROLL):
            c = code.add(channel.index, u)
            b = _vectors(code, code.at("%w", code.mul(c, "%columns")), vectors)
            for r in range(rows):
                a = code.spread(code.at(inputs[r], c))
                for j in range(vectors):
                    sums[r * vectors + j] = code.fma(a, b[j], sums[r * vectors + j])
    for r in range(rows):
        row = _row(code, "%out", "%output_rows", places[r], "%columns")
        row = code.select(real[r], row, "%nobody", "ptr")
        _add_to(code, row, sums[r * vectors : (r + 1) * vectors])


def _outer(vectors: int, width: int, rows: int) -> str:
    """dw[c, :n] (+)= sum over the pairs first..last of x[i, c] g[o, :n], for channels c0..c1, `rows` of them a turn."""
    code = Code(
        f"define internal void @outer_{vectors}_{width}(ptr noalias %x, ptr noalias %g, ptr noalias %dw, "
        "ptr noalias %input_rows, ptr noalias %output_rows, i64 %first, i64 %last, i64 %c0, i64 %c1, i64 %channels, "
        "i64 %columns, i1 %add)",
        width,
    )
    with code.loop("%c0", "%c1", rows) as channel:
        with code.loop("%first", "%last", zeros=rows * vectors) as pair:
            sums = pair.values
            x = _row(code, "%x", "%input_rows", pair.index, "%channels")
            g = _row(code, "%g", "%output_rows", pair.index, "%columns")
            a, b = code.at(x, channel.index), _vectors(code, g, vectors)
            for r in range(rows):
                one = code.spread(code.at(a, r))
                for j in range(vectors):
                    sums[r * vectors + j] = code.fma(one, b[j], sums[r * vectors + j])
        targets = [code.at("%dw", code.mul(code.add(channel.index, r), "%columns")) for r in range(rows)]

        def each(write: Callable[[Code, str, list[str]], None]) -> None:
            for r, target in enumerate(targets):
                write(code, target, sums[r * vectors : (r + 1) * vectors])

        code.either("%add", lambda: each(_add_to), lambda: each(_store))
    return code.end()


def _convolve(shape: Shape) -> str:
    """Tile by tile of output rows: zeros, then every offset's pairs, panel by panel of columns."""
    code = _entry("convolve", CONVOLVE)
    nobody = code.value(f"alloca [{shape.vectors * shape.width} x float], align 64")
    matrix, edges = code.mul("%channels", "%columns"), code.add("%tasks", 1)

    def panel_by_panel(k: str, first: str, last: str) -> None:
        with code.loop(0, "%panels") as n:
            column, kind = code.number("%panel_columns", n.index), code.number("%panel_kinds", n.index)
            w, out = code.at("%w", code.add(code.mul(k, matrix), column)), code.at("%out", column)
            given = f"ptr %x, ptr {w}, ptr {out}, ptr %input_rows, ptr %output_rows, i64 {first}, i64 {last}"
            _call(code, "panel", kind, f"{given}, i64 %channels, i64 %columns, ptr {nobody}", shape)

    with code.tasks("%arguments", "%tasks") as task:
        row = code.mul(task, "%tile_rows")
        end = code.least(code.add(row, "%tile_rows"), "%rows")
        _clear(code, code.at("%out", code.mul(row, "%columns")), code.sub(end, row))
        with code.loop(0, "%offsets") as offset:
            k = offset.index
            bounds = code.at("%bounds", code.add(code.mul(k, edges), task), "i64")
            first, last = code.number(bounds, 0), code.number(bounds, 1)
            code.either(code.less(first, last), lambda: panel_by_panel(k, first, last))
    return code.end()


def _weight_gradient(shape: Shape) -> str:
    """Offset by offset, block by block of channels: chunks of pairs that fit the cache, panel by panel of columns."""
    code = _entry("weight_gradient", WEIGHT_GRADIENT)
    matrix = code.mul("%channels", "%columns")

    def chunk_by_chunk(first: str, last: str, dw: str, c0: str, c1: str) -> None:
        with code.loop(first, last, "%chunk") as chunk:
            begin, add = chunk.index, code.less(first, chunk.index)
            end = code.least(code.add(begin, "%chunk"), last)
            with code.loop(0, "%panels") as n:
                column, kind = code.number("%panel_columns", n.index), code.number("%panel_kinds", n.index)
                rows = f"ptr %x, ptr {code.at('%g', column)}, ptr {code.at(dw, column)}, ptr %input_rows"
                given = f"{rows}, ptr %output_rows, i64 {begin}, i64 {end}, i64 {c0}, i64 {c1}"
                _call(code, "outer", kind, f"{given}, i64 %channels, i64 %columns, i1 {add}", shape)

    with code.tasks("%arguments", "%tasks") as task:
        k, block = code.value(f"udiv i64 {task}, %blocks"), code.value(f"urem i64 {task}, %blocks")
        c0 = code.mul(block, "%block")
        c1 = code.least(code.add(c0, "%block"), "%channels")
        first, last = code.number("%bounds", k), code.number("%bounds", code.add(k, 1))
        dw = code.at("%dw", code.mul(k, matrix))
        code.either(
            code.less(first, last),
            lambda: chunk_by_chunk(first, last, dw, c0, c1),
            lambda: _clear(code, code.at(dw, code.mul(c0, "%columns")), code.sub(c1, c0)),
        )
    return code.end()


def _transpose() -> str:
    """Block by block: rows are loaded, halves, quarters and eighths of pairs of them change places, columns stored."""
    code = _entry("transpose", TRANSPOSE, BLOCK)
    matrix = code.mul("%channels", "%columns")
    with code.tasks("%arguments", "%tasks") as task:
        k, block = code.value(f"udiv i64 {task}, %blocks"), code.value(f"urem i64 {task}, %blocks")
        column, first = code.mul(block, BLOCK), code.mul(k, matrix)
        w, out = code.at("%w", first), code.at("%out", first)
        with code.loop(0, "%channels", BLOCK) as channel:
            c = channel.index
            rows = [code.load(code.at(w, code.add(code.mul(code.add(c, i), "%columns"), column))) for i in range(BLOCK)]
            for step in (4, 2, 1):
                low = [lane if not lane & step else BLOCK + lane - step for lane in range(BLOCK)]
                high = [lane + step if not lane & step else BLOCK + lane for lane in range(BLOCK)]
                for i in (i for i in range(BLOCK) if not i & step):
                    pair = rows[i], rows[i + step]
                    rows[i], rows[i + step] = code.shuffle(*pair, low), code.shuffle(*pair, high)
            for i in range(BLOCK):
                code.store(rows[i], code.at(out, code.add(code.mul(code.add(column, i), "%channels"), c)))
    return code.end()


def _entry(name: str, arguments: list[str], width: int = 0) -> Code:
    """An entry point that begins by reading %name of every argument but the counter."""
    code = Code(f"define void @{name}(ptr %arguments)", width)
    for place, argument in enumerate(arguments[1:], start=1):
        address = code.at("%arguments", place, "i64")
        code.do(f"%{argument} = load {'ptr' if argument in _ADDRESSES else 'i64'}, ptr {address}")
    return code


def _row(code: Code, matrix: str, rows: str, place: str, length: str) -> str:
    """Address of row rows[place] of a matrix with rows of `length` floats."""
    return code.at(matrix, code.mul(code.number(rows, place), length))


def _vectors(code: Code, start: str, vectors: int) -> list[str]:
    return [code.load(code.at(start, j * code.width)) for j in range(vectors)]


def _store(code: Code, row: str, sums: list[str]) -> None:
    for j, value in enumerate(sums):
        code.store(value, code.at(row, j * code.width))


def _add_to(code: Code, row: str, sums: list[str]) -> None:
    for j, value in enumerate(sums):
        address = code.at(row, j * code.width)
        code.store(code.value(f"fadd {code.vector} {code.load(address)}, {value}"), address)


def _clear(code: Code, start: str, rows: str) -> None:
    """Zeros in so many rows of `columns` floats."""
    size = code.mul(code.mul(rows, "%columns"), 4)
    code.do(f"call void @llvm.memset.p0.i64(ptr {start}, i8 0, i64 {size}, i1 false)")


def _call(code: Code, function: str, kind: str, arguments: str, shape: Shape) -> None:
    """Calls the function for a panel of that kind."""
    code.switch(kind, [f"call void @{function}_{count}_{width}({arguments})" for count, width in shape.kinds])
