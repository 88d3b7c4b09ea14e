"""Few rows in which each value of each factor meets each value of every other one."""

from itertools import combinations, product


def rows(factors):
    """Return dicts of a value for each of `factors` (name to values) that cover all pairs."""
    names = list(factors)
    choices = [range(len(factors[name])) for name in names]
    open_pairs = {
        (i, a, j, b)
        for i, j in combinations(range(len(names)), 2)
        for a, b in product(choices[i], choices[j])
    }
    found = []
    while open_pairs:
        i, a, j, b = min(open_pairs)
        row = {i: a, j: b}
        # The other factors in turn, each with the value that covers most.
        for k in range(len(names)):
            if k not in row:
                row[k] = max(choices[k], key=lambda c: _covered(open_pairs, row, k, c))
        open_pairs -= {(i, row[i], j, row[j]) for i, j in combinations(range(len(names)), 2)}
        found.append({name: factors[name][row[k]] for k, name in enumerate(names)})
    return found


def _covered(open_pairs, row, k, c):
    return sum(((i, a, k, c) if i < k else (k, c, i, a)) in open_pairs for i, a in row.items())
