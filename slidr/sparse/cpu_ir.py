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

from dataclasses import dataclass

# Arguments of the entry points, in their order.
_SHARED = ["panel_columns", "panel_kinds", "panels"]
CONVOLVE = ["counter", "tasks", "x", "w", "out", "input_rows", "output_rows", "bounds", "channels", "columns"]
CONVOLVE += ["offsets", "tile_rows", "rows", *_SHARED]
WEIGHT_GRADIENT = ["counter", "tasks", "x", "g", "dw", "input_rows", "output_rows", "bounds", "channels", "columns"]
WEIGHT_GRADIENT += ["block", "blocks", "chunk", *_SHARED]
TRANSPOSE = ["counter", "tasks", "w", "out", "channels", "columns", "blocks"]
_ADDRESSES = {"x", "w", "out", "g", "dw", "input_rows", "output_rows", "bounds", "panel_columns", "panel_kinds"}
_UNROLL = 4  # channels a turn of the inner loop


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
    widths = sorted({width for _, width in shape.kinds})
    declared = [f"declare {_v(w)} @llvm.fma.v{w}f32({_v(w)}, {_v(w)}, {_v(w)})" for w in widths]
    return "\n".join(
        [_panel(count, width, shape.rows) for count, width in shape.kinds]
        + [_outer(count, width, shape.rows) for count, width in shape.kinds]
        + [_convolve(shape), _weight_gradient(shape), _transpose(), *declared]
        + ["declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)"]
        # Without it LLVM halves wide vectors on processors that it takes for slow at them.
        + ['attributes #0 = { nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }\n']
    )


def _panel(vectors: int, width: int, rows: int) -> str:
    """out[o, :n] += x[i] @ w[:, :n] for the pairs first..last of one offset, n = vectors * width columns.

    `rows` pairs a turn, or half of them where no more are left. What a turn has too many repeats the last pair and adds
    to a row that nobody reads.
    """
    turns = [_turn(f"t{size}", vectors, width, size) for size in (rows, rows // 2)]
    return f"""
define internal void @panel_{vectors}_{width}(
    ptr noalias %x, ptr noalias %w, ptr noalias %out, ptr noalias %input_rows, ptr noalias %output_rows,
    i64 %first, i64 %last, i64 %channels, i64 %columns, ptr noalias %nobody) #0 {{
entry:
  %final = sub i64 %last, 1
  br label %head
head:
  %p = phi i64 [ %first, %entry ], [ %t{rows}.p, %t{rows}.stored ], [ %t{rows // 2}.p, %t{rows // 2}.stored ]
  %left = sub i64 %last, %p
  %few = icmp ule i64 %left, {rows // 2}
  br i1 %few, label %t{rows // 2}.begin, label %t{rows}.begin
{turns[0]}
{turns[1]}
exit:
  ret void
}}"""


def _turn(t: str, vectors: int, width: int, rows: int) -> str:
    kind, lines = _v(width), [f"{t}.begin:"]
    for r in range(rows):
        lines += [
            f"  %{t}.q{r} = add i64 %p, {r}",
            f"  %{t}.real{r} = icmp ult i64 %{t}.q{r}, %last",
            f"  %{t}.s{r} = select i1 %{t}.real{r}, i64 %{t}.q{r}, i64 %final",
            *_row(f"{t}.a{r}", "x", "input_rows", f"%{t}.s{r}", "channels"),
        ]
    lines += [
        f"  br label %{t}.loop",
        f"{t}.loop:",
        f"  %{t}.c = phi i64 [ 0, %{t}.begin ], [ %{t}.c.next, %{t}.loop ]",
    ]
    tile = [(r, j) for r in range(rows) for j in range(vectors)]
    lines += [
        f"  %{t}.s{r}_{j}_0 = phi {kind} [ zeroinitializer, %{t}.begin ], [ %{t}.s{r}_{j}_{_UNROLL}, %{t}.loop ]"
        for r, j in tile
    ]
    for u in range(_UNROLL):
        lines += [f"  %{t}.c{u} = add i64 %{t}.c, {u}", f"  %{t}.wc{u} = mul i64 %{t}.c{u}, %columns"]
        lines += [f"  %{t}.w{u} = getelementptr float, ptr %w, i64 %{t}.wc{u}"]
        lines += _vectors(f"{t}.b{u}", f"%{t}.w{u}", vectors, width)
        for r in range(rows):
            lines += [f"  %{t}.ap{u}_{r} = getelementptr float, ptr %{t}.a{r}, i64 %{t}.c{u}"]
            lines += _spread(f"{t}.as{u}_{r}", f"%{t}.ap{u}_{r}", width)
            lines += [
                f"  %{t}.s{r}_{j}_{u + 1} = " + _fma(width, f"%{t}.as{u}_{r}", f"%{t}.b{u}_{j}", f"%{t}.s{r}_{j}_{u}")
                for j in range(vectors)
            ]
    lines += [
        f"  %{t}.c.next = add i64 %{t}.c, {_UNROLL}",
        f"  %{t}.more = icmp ult i64 %{t}.c.next, %channels",
        f"  br i1 %{t}.more, label %{t}.loop, label %{t}.stored",
        f"{t}.stored:",
    ]
    for r in range(rows):
        lines += _row(f"{t}.o{r}", "out", "output_rows", f"%{t}.s{r}", "columns")
        lines += [f"  %{t}.t{r} = select i1 %{t}.real{r}, ptr %{t}.o{r}, ptr %nobody"]
        lines += _add_to(f"{t}.t{r}", [f"%{t}.s{r}_{j}_{_UNROLL}" for j in range(vectors)], width)
    lines += [
        f"  %{t}.p = add i64 %p, {rows}",
        f"  %{t}.again = icmp ult i64 %{t}.p, %last",
        f"  br i1 %{t}.again, label %head, label %exit",
    ]
    return "\n".join(lines)


def _outer(vectors: int, width: int, rows: int) -> str:
    """dw[c, :n] (+)= sum over the pairs first..last of x[i, c] g[o, :n], for channels c0..c1, `rows` of them a turn."""
    kind, tile = _v(width), [(r, j) for r in range(rows) for j in range(vectors)]
    names = [[f"%sum{r}_{j}" for j in range(vectors)] for r in range(rows)]
    lines = [
        f"""
define internal void @outer_{vectors}_{width}(
    ptr noalias %x, ptr noalias %g, ptr noalias %dw, ptr noalias %input_rows, ptr noalias %output_rows,
    i64 %first, i64 %last, i64 %c0, i64 %c1, i64 %channels, i64 %columns, i1 %add) #0 {{
entry:
  br label %begin
begin:
  %c = phi i64 [ %c0, %entry ], [ %c.next, %stored ]
  br label %pair
pair:
  %p = phi i64 [ %first, %begin ], [ %p.next, %pair ]"""
    ]
    lines += [f"  %s{r}_{j} = phi {kind} [ zeroinitializer, %begin ], [ %sum{r}_{j}, %pair ]" for r, j in tile]
    lines += _row("row", "x", "input_rows", "%p", "channels") + _row("gr", "g", "output_rows", "%p", "columns")
    lines += ["  %a = getelementptr float, ptr %row, i64 %c", *_vectors("b", "%gr", vectors, width)]
    for r in range(rows):
        lines += [f"  %ap{r} = getelementptr float, ptr %a, i64 {r}", *_spread(f"as{r}", f"%ap{r}", width)]
        lines += [f"  %sum{r}_{j} = " + _fma(width, f"%as{r}", f"%b_{j}", f"%s{r}_{j}") for j in range(vectors)]
    lines += [
        "  %p.next = add i64 %p, 1",
        "  %more = icmp ult i64 %p.next, %last",
        "  br i1 %more, label %pair, label %done",
        "done:",
    ]
    for r in range(rows):
        lines += [f"  %cr{r} = add i64 %c, {r}", f"  %cd{r} = mul i64 %cr{r}, %columns"]
        lines += [f"  %d{r} = getelementptr float, ptr %dw, i64 %cd{r}"]
    lines += ["  br i1 %add, label %adding, label %storing", "adding:"]
    for r in range(rows):
        lines += _add_to(f"d{r}", names[r], width)
    lines += ["  br label %stored", "storing:"]
    for r, j in tile:
        lines += [f"  %e{r}_{j} = getelementptr float, ptr %d{r}, i64 {j * width}"]
        lines += [f"  store {kind} %sum{r}_{j}, ptr %e{r}_{j}, align 4"]
    lines += [
        f"""  br label %stored
stored:
  %c.next = add i64 %c, {rows}
  %again = icmp ult i64 %c.next, %c1
  br i1 %again, label %begin, label %exit
exit:
  ret void
}}"""
    ]
    return "\n".join(lines)


def _convolve(shape: Shape) -> str:
    """Tile by tile of output rows: zeros, then every offset's pairs, panel by panel of columns."""
    call = (
        "ptr %x, ptr %w.panel, ptr %out.panel, ptr %input_rows, ptr %output_rows, "
        "i64 %first, i64 %last, i64 %channels, i64 %columns, ptr %nobody"
    )
    return f"""
define void @convolve(ptr %arguments) #0 {{
entry:
{_arguments(CONVOLVE)}
  %nobody = alloca [{shape.vectors * shape.width} x float], align 64
  %matrix = mul i64 %channels, %columns
  %edges = add i64 %tasks, 1
  br label %next
next:
{_draw()}
work:
  %row0 = mul i64 %task, %tile_rows
  %row1 = add i64 %row0, %tile_rows
  %row2 = call i64 @llvm.umin.i64(i64 %row1, i64 %rows)
  %count = sub i64 %row2, %row0
{_clear("out", "%row0", "%count")}
  br label %offset
offset:
  %k = phi i64 [ 0, %work ], [ %k.next, %offset.done ]
  %bk = mul i64 %k, %edges
  %bt = add i64 %bk, %task
  %first.p = getelementptr i64, ptr %bounds, i64 %bt
  %first = load i64, ptr %first.p
  %last.p = getelementptr i64, ptr %first.p, i64 1
  %last = load i64, ptr %last.p
  %any = icmp ult i64 %first, %last
  br i1 %any, label %panel, label %offset.done
panel:
  %n = phi i64 [ 0, %offset ], [ %n.next, %panel.done ]
{_panel_at("%n")}
  %wk = mul i64 %k, %matrix
  %wd = add i64 %wk, %column
  %w.panel = getelementptr float, ptr %w, i64 %wd
  %out.panel = getelementptr float, ptr %out, i64 %column
{_call_of_kind("panel", call, shape)}
panel.done:
  %n.next = add i64 %n, 1
  %n.more = icmp ult i64 %n.next, %panels
  br i1 %n.more, label %panel, label %offset.done
offset.done:
  %k.next = add i64 %k, 1
  %k.more = icmp ult i64 %k.next, %offsets
  br i1 %k.more, label %offset, label %next
exit:
  ret void
}}
declare i64 @llvm.umin.i64(i64, i64)"""


def _weight_gradient(shape: Shape) -> str:
    """Offset by offset, block by block of channels: chunks of pairs that fit the cache, panel by panel of columns."""
    call = (
        "ptr %x, ptr %g.panel, ptr %dw.panel, ptr %input_rows, ptr %output_rows, "
        "i64 %q, i64 %q.end, i64 %c0, i64 %c1, i64 %channels, i64 %columns, i1 %add"
    )
    return f"""
define void @weight_gradient(ptr %arguments) #0 {{
entry:
{_arguments(WEIGHT_GRADIENT)}
  %matrix = mul i64 %channels, %columns
  br label %next
next:
{_draw()}
work:
  %k = udiv i64 %task, %blocks
  %b = urem i64 %task, %blocks
  %c0 = mul i64 %b, %block
  %c0.next = add i64 %c0, %block
  %c1 = call i64 @llvm.umin.i64(i64 %c0.next, i64 %channels)
  %first.p = getelementptr i64, ptr %bounds, i64 %k
  %first = load i64, ptr %first.p
  %last.p = getelementptr i64, ptr %first.p, i64 1
  %last = load i64, ptr %last.p
  %dk = mul i64 %k, %matrix
  %dwk = getelementptr float, ptr %dw, i64 %dk
  %any = icmp ult i64 %first, %last
  br i1 %any, label %chunk.begin, label %none
none:
  %none.count = sub i64 %c1, %c0
{_clear("dwk", "%c0", "%none.count")}
  br label %next
chunk.begin:
  %q = phi i64 [ %first, %work ], [ %q.end, %chunk.done ]
  %q.next = add i64 %q, %chunk
  %q.end = call i64 @llvm.umin.i64(i64 %q.next, i64 %last)
  %add = icmp ugt i64 %q, %first
  br label %panel
panel:
  %n = phi i64 [ 0, %chunk.begin ], [ %n.next, %panel.done ]
{_panel_at("%n")}
  %g.panel = getelementptr float, ptr %g, i64 %column
  %dw.panel = getelementptr float, ptr %dwk, i64 %column
{_call_of_kind("outer", call, shape)}
panel.done:
  %n.next = add i64 %n, 1
  %n.more = icmp ult i64 %n.next, %panels
  br i1 %n.more, label %panel, label %chunk.done
chunk.done:
  %q.more = icmp ult i64 %q.end, %last
  br i1 %q.more, label %chunk.begin, label %next
exit:
  ret void
}}"""


BLOCK = 8  # rows and columns of what is transposed in registers


def _transpose() -> str:
    """Block by block: rows are loaded, halves, quarters and eighths of pairs of them change places, columns stored."""
    kind, lines, names = _v(BLOCK), [], [f"%r{i}" for i in range(BLOCK)]
    for i in range(BLOCK):
        lines += [
            f"  %c{i} = add i64 %c, {i}",
            f"  %co{i} = mul i64 %c{i}, %columns",
            f"  %ca{i} = add i64 %co{i}, %column",
        ]
        lines += [f"  %cp{i} = getelementptr float, ptr %wk, i64 %ca{i}", f"  %r{i} = load {kind}, ptr %cp{i}, align 4"]
    step = BLOCK // 2
    while step:
        for i in (i for i in range(BLOCK) if not i & step):
            a, b = names[i], names[i + step]
            low = [lane if not lane & step else BLOCK + lane - step for lane in range(BLOCK)]
            high = [lane + step if not lane & step else BLOCK + lane for lane in range(BLOCK)]
            for row, mask in ((i, low), (i + step, high)):
                names[row] = f"%r{row}_{step}"
                lanes = ", ".join(f"i32 {lane}" for lane in mask)
                lines += [f"  {names[row]} = shufflevector {kind} {a}, {kind} {b}, <{BLOCK} x i32> <{lanes}>"]
        step //= 2
    for i in range(BLOCK):
        lines += [
            f"  %d{i} = add i64 %column, {i}",
            f"  %do{i} = mul i64 %d{i}, %channels",
            f"  %da{i} = add i64 %do{i}, %c",
        ]
        lines += [
            f"  %dp{i} = getelementptr float, ptr %ok, i64 %da{i}",
            f"  store {kind} {names[i]}, ptr %dp{i}, align 4",
        ]
    body = "\n".join(lines)
    return f"""
define void @transpose(ptr %arguments) #0 {{
entry:
{_arguments(TRANSPOSE)}
  %matrix = mul i64 %channels, %columns
  br label %next
next:
{_draw()}
work:
  %k = udiv i64 %task, %blocks
  %b = urem i64 %task, %blocks
  %column = mul i64 %b, {BLOCK}
  %first = mul i64 %k, %matrix
  %wk = getelementptr float, ptr %w, i64 %first
  %ok = getelementptr float, ptr %out, i64 %first
  br label %block
block:
  %c = phi i64 [ 0, %work ], [ %c.next, %block ]
{body}
  %c.next = add i64 %c, {BLOCK}
  %more = icmp ult i64 %c.next, %channels
  br i1 %more, label %block, label %next
exit:
  ret void
}}"""


def _v(width: int) -> str:
    return f"<{width} x float>"


def _fma(width: int, a: str, b: str, c: str) -> str:
    return f"call {_v(width)} @llvm.fma.v{width}f32({_v(width)} {a}, {_v(width)} {b}, {_v(width)} {c})"


def _row(name: str, matrix: str, rows: str, at: str, length: str) -> list[str]:
    """%name = address of row rows[at] of a matrix with rows of `length` floats."""
    return [
        f"  %{name}.p = getelementptr i64, ptr %{rows}, i64 {at}",
        f"  %{name}.i = load i64, ptr %{name}.p",
        f"  %{name}.f = mul i64 %{name}.i, %{length}",
        f"  %{name} = getelementptr float, ptr %{matrix}, i64 %{name}.f",
    ]


def _vectors(name: str, start: str, vectors: int, width: int) -> list[str]:
    """%name_j = the j-th vector from an address on."""
    lines = []
    for j in range(vectors):
        lines += [f"  %{name}_{j}.p = getelementptr float, ptr {start}, i64 {j * width}"]
        lines += [f"  %{name}_{j} = load {_v(width)}, ptr %{name}_{j}.p, align 4"]
    return lines


def _spread(name: str, address: str, width: int) -> list[str]:
    """%name = a vector of the one float at an address."""
    return [
        f"  %{name}.f = load float, ptr {address}, align 4",
        f"  %{name}.v = insertelement {_v(width)} poison, float %{name}.f, i64 0",
        f"  %{name} = shufflevector {_v(width)} %{name}.v, {_v(width)} poison, <{width} x i32> zeroinitializer",
    ]


def _add_to(row: str, sums: list[str], width: int) -> list[str]:
    lines = []
    for j, value in enumerate(sums):
        lines += [
            f"  %{row}.p{j} = getelementptr float, ptr %{row}, i64 {j * width}",
            f"  %{row}.old{j} = load {_v(width)}, ptr %{row}.p{j}, align 4",
            f"  %{row}.new{j} = fadd {_v(width)} %{row}.old{j}, {value}",
            f"  store {_v(width)} %{row}.new{j}, ptr %{row}.p{j}, align 4",
        ]
    return lines


def _arguments(names: list[str]) -> str:
    """%name of every argument but the counter."""
    lines = []
    for place, name in enumerate(names[1:], start=1):
        lines += [f"  %{name}.arg = getelementptr i64, ptr %arguments, i64 {place}"]
        lines += [f"  %{name} = load {'ptr' if name in _ADDRESSES else 'i64'}, ptr %{name}.arg"]
    return "\n".join(lines)


def _draw() -> str:
    return """  %task = atomicrmw add ptr %arguments, i64 1 monotonic
  %some = icmp ult i64 %task, %tasks
  br i1 %some, label %work, label %exit"""


def _clear(matrix: str, first: str, count: str) -> str:
    """Zeros in `count` rows of `columns` floats."""
    return f"""  %clear.first = mul i64 {first}, %columns
  %clear.floats = mul i64 {count}, %columns
  %clear.bytes = shl i64 %clear.floats, 2
  %clear.p = getelementptr float, ptr %{matrix}, i64 %clear.first
  call void @llvm.memset.p0.i64(ptr %clear.p, i8 0, i64 %clear.bytes, i1 false)"""


def _panel_at(place: str) -> str:
    return f"""  %column.p = getelementptr i64, ptr %panel_columns, i64 {place}
  %column = load i64, ptr %column.p
  %kind.p = getelementptr i64, ptr %panel_kinds, i64 {place}
  %kind = load i64, ptr %kind.p"""


def _call_of_kind(function: str, arguments: str, shape: Shape) -> str:
    cases = " ".join(f"i64 {n}, label %kind{n}" for n in range(len(shape.kinds)))
    calls = [
        f"kind{n}:\n  call void @{function}_{count}_{width}({arguments})\n  br label %panel.done"
        for n, (count, width) in enumerate(shape.kinds)
    ]
    return "\n".join([f"  switch i64 %kind, label %panel.done [ {cases} ]", *calls])
