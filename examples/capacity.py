"""How many tokens of a text two vectors hold: the longest prefix that comes back."""

from pathlib import Path

import prototok

lm = prototok.load("tiny-neox")
book = Path(prototok.__file__).parent / "models" / "tiny-neox" / "held_out.txt"
ids = lm.encode(book.read_text(encoding="utf-8"))

found = prototok.capacity(lm, [ids[:16], ids[16:32]], lengths=(2, 4, 8), recipe="fast")
print(found)
for text, longest in enumerate(found.exact.tolist()):
    nats = float(prototok.information(lm, [ids[16 * text :][:longest]]).nats[0])
    print(f"text {text}: {longest} tokens come back whole, {nats:.1f} nats under the model")
assert int(found.exact.min()) >= 4
