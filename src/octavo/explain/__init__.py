"""What a component is: pages made of its docstring, a real forward pass, its cost, its settings and its proof.

Only the prose is written by hand: en/NAME.md and zh/NAME.md, at most fifteen lines each.
"""
