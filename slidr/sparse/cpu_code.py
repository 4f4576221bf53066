"""Writing a function in LLVM IR: values get names of their own, loops and branches their blocks. Text in, text out.

Values and addresses are names (``%v7``) or numbers; integers have 64 bits, floats 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Value = str | int


@dataclass
class Loop:
    """`index` counts by `step`; `values` go from one turn to the next: the body puts the new ones in their places."""

    index: str
    step: Value
    values: list[str] = field(default_factory=list)


class Code:
    """One function's instructions, in order. `width`: floats of its vectors."""

    def __init__(self, head: str, width: int = 0) -> None:
        self.width, self.vector = width, f"<{width} x float>"
        self._lines, self._names, self._block = [f"\n{head} #0 {{"], 0, ""
        self._begin("entry")

    def end(self) -> str:
        return "\n".join([*self._lines, "  ret void", "}"])

    def do(self, text: str) -> None:
        self._lines.append(f"  {text}")

    def value(self, text: str) -> str:
        name = self._name("%v")
        self.do(f"{name} = {text}")
        return name

    # Integers and addresses

    def add(self, a: Value, b: Value) -> str:
        return self.value(f"add i64 {a}, {b}")

    def sub(self, a: Value, b: Value) -> str:
        return self.value(f"sub i64 {a}, {b}")

    def mul(self, a: Value, b: Value) -> str:
        return self.value(f"mul i64 {a}, {b}")

    def least(self, a: Value, b: Value) -> str:
        return self.value(f"call i64 @llvm.umin.i64(i64 {a}, i64 {b})")

    def less(self, a: Value, b: Value) -> str:
        return self.value(f"icmp ult i64 {a}, {b}")

    def select(self, condition: str, a: Value, b: Value, kind: str = "i64") -> str:
        return self.value(f"select i1 {condition}, {kind} {a}, {kind} {b}")

    def at(self, array: str, place: Value, kind: str = "float") -> str:
        return self.value(f"getelementptr {kind}, ptr {array}, i64 {place}")

    def number(self, array: str, place: Value) -> str:
        """An array's integer at a place."""
        return self.value(f"load i64, ptr {self.at(array, place, 'i64')}")

    # Vectors

    def load(self, address: str) -> str:
        return self.value(f"load {self.vector}, ptr {address}, align 4")

    def store(self, vector: str, address: str) -> None:
        self.do(f"store {self.vector} {vector}, ptr {address}, align 4")

    def spread(self, address: str) -> str:
        """A vector of the one float at an address."""
        one = self.value(f"load float, ptr {address}, align 4")
        first = self.value(f"insertelement {self.vector} poison, float {one}, i64 0")
        lanes = f"<{self.width} x i32> zeroinitializer"
        return self.value(f"shufflevector {self.vector} {first}, {self.vector} poison, {lanes}")

    def fma(self, a: str, b: str, c: str) -> str:
        """a * b + c, rounded once."""
        kind = self.vector
        return self.value(f"call {kind} @llvm.fma.v{self.width}f32({kind} {a}, {kind} {b}, {kind} {c})")

    def shuffle(self, a: str, b: str, lanes: list[int]) -> str:
        """The lanes of `a` followed by `b` that are named."""
        mask = ", ".join(f"i32 {lane}" for lane in lanes)
        return self.value(f"shufflevector {self.vector} {a}, {self.vector} {b}, <{len(lanes)} x i32> <{mask}>")

    # Blocks

    @contextmanager
    def loop(self, start: Value, end: Value, step: Value = 1, zeros: int = 0) -> Iterator[Loop]:
        """From `start` to `end`, at least once, with `zeros` vectors that are zero at first."""
        before, label = self._block, self._name("loop")
        self.do(f"br label %{label}")
        self._begin(label)
        place, first = len(self._lines), [self._name("%v") for _ in range(zeros)]
        loop = Loop(self._name("%v"), step, list(first))
        yield loop
        following = self.add(loop.index, loop.step)
        more, last = self.less(following, end), self._block
        self._lines[place:place] = [
            f"  {loop.index} = phi i64 [ {start}, %{before} ], [ {following}, %{last} ]",
            *(
                f"  {old} = phi {self.vector} [ zeroinitializer, %{before} ], [ {new}, %{last} ]"
                for old, new in zip(first, loop.values, strict=True)
            ),
        ]
        after = self._name("after")
        self.do(f"br i1 {more}, label %{label}, label %{after}")
        self._begin(after)

    def either(self, condition: str, yes: Callable[[], None], no: Callable[[], None] = lambda: None) -> None:
        """Writes both branches; what follows runs after one of them."""
        labels, after = (self._name("yes"), self._name("no")), self._name("after")
        self.do(f"br i1 {condition}, label %{labels[0]}, label %{labels[1]}")
        for label, body in zip(labels, (yes, no), strict=True):
            self._begin(label)
            body()
            self.do(f"br label %{after}")
        self._begin(after)

    @contextmanager
    def tasks(self, counter: str, count: str) -> Iterator[str]:
        """As long as the shared counter, drawn anew each time, is below `count`: the number drawn."""
        draw, work, after = self._name("draw"), self._name("work"), self._name("after")
        self.do(f"br label %{draw}")
        self._begin(draw)
        task = self.value(f"atomicrmw add ptr {counter}, i64 1 monotonic")
        self.do(f"br i1 {self.less(task, count)}, label %{work}, label %{after}")
        self._begin(work)
        yield task
        self.do(f"br label %{draw}")
        self._begin(after)

    def switch(self, number: str, cases: list[str]) -> None:
        """Runs the instruction of that number."""
        labels, after = [self._name("case") for _ in cases], self._name("after")
        targets = " ".join(f"i64 {n}, label %{label}" for n, label in enumerate(labels))
        self.do(f"switch i64 {number}, label %{after} [ {targets} ]")
        for label, case in zip(labels, cases, strict=True):
            self._begin(label)
            self.do(case)
            self.do(f"br label %{after}")
        self._begin(after)

    def _name(self, stem: str) -> str:
        self._names += 1
        return f"{stem}{self._names}"

    def _begin(self, label: str) -> None:
        self._lines.append(f"{label}:")
        self._block = label
