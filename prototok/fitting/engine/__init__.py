"""The engine behind `fast_fit`: recipe, rows and units, slots on the device, the step, the loop."""
