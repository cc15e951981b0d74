"""Two solutions of one text: the straight line between them breaks, a bent one need not."""

import prototok
from prototok.geometry import BezierSettings

lm = prototok.load("tiny-neox")
fit = prototok.fast_fit(lm, ["The sun rose over the hills."], length=4, seeds=2)
assert bool(fit.exact.all())

straight = prototok.interpolate(lm, fit, [(0, 1)], points=11)
bent = prototok.connect(lm, fit, [(0, 1)], points=11, settings=BezierSettings(max_steps=200))
print("accuracy on the line:", straight.accuracy[0].tolist())
print("accuracy on the curve:", bent.accuracy[0].tolist())
print(f"the curve is {float(bent.length_ratio[0]):.2f} times as long")
assert float(straight.accuracy[0, 0]) == float(straight.accuracy[0, -1]) == 1.0
