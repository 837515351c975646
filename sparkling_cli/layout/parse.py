"""Text to terms. Errors point at the fault with a caret.

Grammar::

    layout := [dims "|"] ( dims ("<-" | "->") dims | "<-" dims | ("scale" | "bias") dims | dims )
    dims   := term+                       each term is one storage dim
    term   := [label ":"] ( name | integer | "(" inner ")" )
    inner  := term+ | term ("+" term)+

``out <- in`` and ``in -> out`` are both written in storage order. ``<- in`` is a map whose outputs are
flattened together with its inputs, as in ``<- (experts hidden)``: the outputs must not grow. Dims without an
arrow or a word before them are ``scale``-like: elementwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import (
    Axis,
    Dim,
    Expr,
    Fixed,
    Product,
    Role,
    Sum,
    TensorLayout,
)

_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*)|(?P<int>\d+)|(?P<op><-|->|[()+:|]))")
_MAX_DEPTH = 16


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


def fault(text: str, at: int, message: str) -> LayoutError:
    """A layout error with the text and a caret under the fault."""
    return LayoutError(f"{message}\n    {text}\n    {' ' * at}^")


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    at = 0
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise fault(text, at, f"unexpected character {text[at]!r}")
        kind = str(match.lastgroup)
        tokens.append(_Token(kind, match.group(kind), match.start(kind)))
        at = match.end()
    tokens.append(_Token("end", "", end))
    return tokens


class _Parser:
    """Recursive descent over one layout text; construct, then call ``layout`` or ``term`` once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokens(text)
        self.i = 0
        self.depth = 0

    @property
    def head(self) -> _Token:
        return self.tokens[self.i]

    def take(self) -> _Token:
        token = self.head
        self.i += 1
        return token

    def fail(self, message: str) -> LayoutError:
        return fault(self.text, self.head.at, message)

    def starts_term(self) -> bool:
        return self.head.kind in ("name", "int") or self.head.text == "("

    def term(self) -> Expr:
        token = self.take()
        if token.kind == "int":
            if int(token.text) < 1 or len(token.text) > 18:
                self.i -= 1
                raise self.fail(f"a size must be between 1 and 10^18, found {token.text}")
            return Fixed(int(token.text))
        if token.kind == "name":
            if self.head.text == ":":
                self.take()
                return self._label(token)
            return Axis(token.text)
        if token.text == "(":
            return self._group()
        self.i -= 1
        raise self.fail(f"expected an axis, a size or '(', found {token.text or 'the end'!r}")

    def _label(self, label: _Token) -> Expr:
        inner = self.term()
        if inner.label is not None:
            raise fault(self.text, label.at, "a term can have one label only")
        return replace(inner, label=label.text)

    def _group(self) -> Expr:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.fail(f"more than {_MAX_DEPTH} nested parentheses")
        terms = [self.term()]
        summing = self.head.text == "+"
        while self.head.text != ")":
            if summing:
                if self.head.text != "+":
                    raise self.fail("expected '+' or ')'; put products in parentheses of their own")
                self.take()
            elif not self.starts_term():
                raise self.fail(f"expected ')' or an axis, found {self.head.text or 'the end'!r}")
            terms.append(self.term())
        self.take()
        self.depth -= 1
        if len(terms) == 1:
            return terms[0]
        return Sum(tuple(terms)) if summing else Product(tuple(terms))

    def dims(self, role: Role) -> list[Dim]:
        if not self.starts_term():
            raise self.fail(f"expected an axis, a size or '(', found {self.head.text or 'the end'!r}")
        found = []
        while self.starts_term():
            found.append(Dim(self.term(), role))
        return found

    def layout(self) -> list[Dim]:
        if self.head.kind == "end":
            return []
        if self.head.text in ("scale", "bias") and self.tokens[self.i + 1].kind != "end":
            role = Role.SCALE if self.take().text == "scale" else Role.BIAS
            return self.dims(role)
        if self.head.text == "<-":
            self.take()
            return self.dims(Role.IN)
        first = self.dims(Role.SCALE)
        if self.head.text == "|":
            self.take()
            return [Dim(d.expr, Role.STACK) for d in first] + self.layout()
        if self.head.text in ("<-", "->"):
            outward = self.take().text == "->"
            left, right = (Role.IN, Role.OUT) if outward else (Role.OUT, Role.IN)
            return [Dim(d.expr, left) for d in first] + self.dims(right)
        return first

    def end(self) -> None:
        if self.head.kind != "end":
            raise self.fail(f"unexpected {self.head.text!r}")


@lru_cache(maxsize=4096)
def parse_layout(text: str) -> TensorLayout:
    """Parse one tensor's layout, e.g. ``experts | (gate_up ffn) <- hidden``.

    Raises:
        LayoutError: with a caret under the fault.
    """
    parser = _Parser(text)
    dims = tuple(parser.layout())
    parser.end()
    return TensorLayout(dims, " ".join(text.split()))


@lru_cache(maxsize=1024)
def parse_expr(text: str) -> Expr:
    """Parse a single term, e.g. ``(kv_heads q_per_kv)``; used for config sizes.

    Raises:
        LayoutError: with a caret under the fault.
    """
    parser = _Parser(text)
    term = parser.term()
    parser.end()
    return term
