"""Values that are sent to see where they turn up."""

import base64
import re
import secrets
import string


class Mark:
    """How all canaries of one kind begin, and every form in which that could be found.

    It is made of letters (or digits), which JSON and URLs leave as they are, whatever they do to the rest of the value.
    """

    def __init__(self, alphabet: str = string.ascii_lowercase, length: int = 18) -> None:
        self.text = "".join(secrets.choice(alphabet) for _ in range(length))
        plain = self.text.encode()
        forms = {plain, plain.hex().encode(), plain.hex().upper().encode(), self.text.encode("utf-16-le")}
        for before in range(3):
            # Four characters of base64 are three bytes: it can begin in three ways, and only whole sextets are its own.
            encoded = base64.b64encode(b"\0" * before + plain)
            own = encoded[-(-before * 8 // 6) : (before + length) * 8 // 6]
            forms |= {own, own.translate(bytes.maketrans(b"+/", b"-_"))}
        self._search = re.compile(b"|".join(map(re.escape, sorted(forms))))
        self._count = 0

    def new(self, around: str = "") -> str:
        """A value that was never sent before."""
        self._count += 1
        return f"{self.text}{self._count}{around}"

    def found(self, where: bytes) -> bytes | None:
        """What was found there, with a little of what is around it."""
        match = self._search.search(where)
        return None if match is None else where[max(match.start() - 40, 0) : match.end() + 40]
