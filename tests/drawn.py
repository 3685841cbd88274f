"Shapes-LT, drawn once for all forks; see `FORKS` in helpers.py"
from cprfl.data.shapes import shapes_lt

for split in ('train', 'test'): shapes_lt(split)
