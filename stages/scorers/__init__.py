"""Scoring engines behind one interface: `base.Scorer`, made by `base.make_scorer`."""
