"""Numbers that would be changed, because a double (IEEE 754, 64 bits) does not give their decimal back.

A parser rounds a number before it can be checked, so fractions are compared with the text of the body. Most bodies have no
fraction and are not looked at. In other bodies only numbers with 16 digits or more are looked at closely: any decimal of 15
digits comes back from a double, unless its exponent is out of range.
"""

import re
from collections.abc import Iterator

import orjson

_DIGITS = b"0123456789."
_LONG = 16  # of these in a row, of which four are left if every fourth is taken
# Bytes of digits and points to "0", all others to NUL.
_CLASSES = bytes(48 if byte in _DIGITS else 0 for byte in range(256))
_RUN = re.compile(b"0" * _LONG + b"0*")
_LONG_TEXT = re.compile(rb"[0-9.]{16,}(?:[eE][+-]?[0-9]+)?")
_PIECE = 65536
_MANY = 10_000  # after so many it is worth the time to find out which of them are in texts
_ENOUGH = 20  # refusals of one body
_LONGEST = 1000  # characters: a longer number is not looked at, and refused

_NUMBER = re.compile(rb"(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
# A number that is not zero can only become zero, or lose its last digits, by an exponent like this one.
_SMALL = re.compile(rb"-(?<=[0-9][eE]-)0*[1-9][0-9]{2}")
_MANTISSA = re.compile(rb"[0-9.]{1,16}(?=[eE]-$)")
_REST = re.compile(rb"[0-9.eE+-]*")
_BLANKS = b" \t\r\n"

# A text with the colon behind a name, or a bracket, and all that is before it. Possessive: a text with many escapes takes no
# memory, and nothing is looked at twice.
_TOKEN = re.compile(rb'[^"{}\[\]]*+(?:("[^"\\]*+(?:\\.[^"\\]*+)*+")([ \t\r\n]*+:)?|([{}\[\]]))', re.DOTALL)


def is_kept(number: int) -> bool:
    """Whether a double is exactly this whole number, or is written as it: 100000000000000000000, 18446744073709552000."""
    try:
        double = float(number)
    except OverflowError:
        return False
    return int(double) == number or _decimal(repr(double).encode()) == _decimal(b"%d" % number)


def changed(raw: bytes, *, has_tiny: bool) -> set[tuple[str, ...]]:
    """Where in this JSON there are fractions that a double does not give back: names of the outermost two fields.

    `raw` was parsed; `has_tiny` says that the parser has found a zero, or a number near it. Of very many the first count.
    """
    search = _Search(raw)
    fields = search.fields(search.long_numbers())
    if has_tiny:
        search = _Search(raw)
        fields |= search.fields(search.small_numbers())
    return fields


class _Search:
    """One way through a body. What looks like a number may be in a text."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._walk = _Walk(raw)
        self._looked_at = 0
        self._end = 0  # the end of the last text that was met

    def fields(self, places: Iterator[int]) -> set[tuple[str, ...]]:
        """The fields of the numbers at these places that a double does not give back."""
        found: set[tuple[str, ...]] = set()
        refused = 0
        for begin in places:
            if begin < self._end:
                continue
            self._looked_at += 1
            if self._looked_at > _MANY and self._is_in_text(begin):
                continue
            number = _NUMBER.match(self._raw, begin)
            if number is None or number.lastindex is None:  # a whole number without an exponent
                continue
            is_short = number.end() - begin <= _LONGEST
            if is_short and (_is_given_back(number[0]) or not self._stands_alone(begin, number.end())):
                continue
            if not self._is_in_text(begin):
                found.add(tuple(self._walk.names))
                refused += 1
                if refused == _ENOUGH:
                    break
        return found

    def long_numbers(self) -> Iterator[int]:
        """Where there are 16 digits or more, if not all of them around are fine."""
        raw, start = self._raw, 0
        while start < len(raw):
            # No number goes over a comma; where there is none, the piece ends behind the number that is there.
            end = raw.rfind(b",", start, start + _PIECE) + 1 or _end_of_number(raw, start + _PIECE)
            piece = raw[start:end]
            if end > self._end and _may_have_changed(piece):
                for run in _RUN.finditer(piece.translate(_CLASSES)):
                    yield start + run.start()
            start = end

    def small_numbers(self) -> Iterator[int]:
        """Where there are exponents below -99."""
        for exponent in _SMALL.finditer(self._raw):
            if exponent.start() < self._end:
                continue
            before = self._raw[max(exponent.start() - _LONG - 1, 0) : exponent.start() + 1]
            if (mantissa := _MANTISSA.search(before)) is not None:
                yield exponent.start() + 1 - len(before) + mantissa.start()

    def _stands_alone(self, begin: int, end: int) -> bool:
        """As numbers of JSON do, and most numbers in texts do not."""
        before = self._raw[max(begin - 64, 0) : begin].removesuffix(b"-").rstrip(_BLANKS)[-1:]
        return before in b"[,:" and self._raw[end : end + 64].lstrip(_BLANKS)[:1] in b"]},"

    def _is_in_text(self, place: int) -> bool:
        self._end = self._walk.end_of_text(place) or self._end
        return place < self._end


def _end_of_number(raw: bytes, place: int) -> int:
    found = _REST.match(raw, place)
    return len(raw) if found is None else found.end()


def _may_have_changed(piece: bytes) -> bool:
    if b'"' not in piece and b"o" in piece:
        return False  # all of it is in one text: outside of texts there is no "o"
    if b"0" * (_LONG // 4) not in piece[::4].translate(_CLASSES) or b"0" * _LONG not in piece.translate(_CLASSES):
        return False
    # All at once: nearly always they come back as they are.
    texts: list[bytes] = _LONG_TEXT.findall(piece)
    together = b"[%b]" % b",".join(texts)
    try:
        given_back = orjson.dumps(orjson.loads(together))
    except orjson.JSONDecodeError:
        return True  # not all of them are numbers
    if together == given_back:
        return False
    pairs = zip(texts, given_back[1:-1].split(b","), strict=True)
    return any(text != back and not _is_same(text, back) for text, back in pairs)


def _is_given_back(text: bytes) -> bool:
    back = orjson.dumps(orjson.loads(text))
    return text == back or _is_same(text, back)


def _is_same(text: bytes, other: bytes) -> bool:
    """Whether two numbers are the same decimal, or the same whole number that is exactly a double."""
    if other == b"null" or len(text) > _LONGEST:  # beyond all doubles
        return False
    digits, exponent = _decimal(text)
    if (digits, exponent) == _decimal(other):
        return True
    return 0 <= exponent < 400 and int(digits) * 10**exponent == int(float(other))


def _decimal(text: bytes) -> tuple[bytes, int]:
    """Digits without zeros on either side, and the power of ten that they are multiplied by; of zero nothing."""
    mantissa, _, power = text.lower().partition(b"e")
    whole, _, fraction = mantissa.partition(b".")
    digits = (whole + fraction).lstrip(b"-0")
    stripped = digits.rstrip(b"0")
    if not stripped:
        return b"", 0
    sign, size = power[:1] if power[:1] == b"-" else b"", power.lstrip(b"+-0") or b"0"
    return stripped, int(sign + size[:9]) - len(fraction) + len(digits) - len(stripped)


class _Walk:
    """A walk over the body's texts and brackets, as far as it was asked for."""

    def __init__(self, raw: bytes) -> None:
        self.names: list[str] = []  # of the outermost two fields around the place that was asked for last
        self._tokens = _TOKEN.finditer(raw)
        self._next = next(self._tokens, None)
        self._depth = 0

    def end_of_text(self, place: int) -> int:
        """Where the text ends in which this place is; 0 if it is in none. Places come in order."""
        while self._next is not None and self._next.end() <= place:
            self._pass(self._next)
            self._next = next(self._tokens, None)
        return 0 if self._next is None or not 0 <= self._next.start(1) <= place else self._next.end(1)

    def _pass(self, token: re.Match[bytes]) -> None:
        text, is_name, bracket = token.groups()
        if bracket is not None:
            self._depth += 1 if bracket in b"{[" else -1
            del self.names[self._depth :]
        elif is_name and self._depth <= 2:
            self.names[self._depth - 1 :] = [orjson.loads(text)]
