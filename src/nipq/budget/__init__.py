"""Budgets: what a choice of bit-widths costs, which choice is best within a limit, and the freeze."""
