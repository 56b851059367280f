"""Groups of numbers on a line: what all schemes that look for levels have in common.

Whatever form the levels of a group have, the weights that take one of them are an interval of the sorted
weights. So a group is sorted once (file `sorted`), and from then on the counts, sums and squared errors
of any set of levels cost a look-up a level, not a pass over the weights. Codes come at the end, from
comparing every weight with the limits between the levels (file `codes`).
"""
