"Lists of COCO-LT mini with the 20 classes of VOC alone; to be run in the folder that has it"
import random
from pathlib import Path

import numpy as np

NAMES = ('airplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'dining table', 'dog',
         'horse', 'motorcycle', 'person', 'potted plant', 'sheep', 'couch', 'train', 'tv')
SIZES = {'train': 640, 'test': 1500} # images

source, out = Path('coco_lt_mini'), Path('voc_classes')
out.mkdir(exist_ok=True)
known = [line.rsplit(' ', 1)[0] for line in (source / 'classes.txt').read_text().splitlines()]
old = [known.index(name) for name in NAMES]
np.save(out / 'text.npy', np.load('text/coco_clip_vit_b_32.npy')[old])
(out / 'classes.txt').write_text(''.join(f'{name} {i}\n' for i, name in enumerate(NAMES)))
draw = random.Random(0)
for split, size in SIZES.items():
    rows = []
    for line in (source / f'coco_lt_{split}.txt').read_text().splitlines():
        path, *ids = line.split()
        kept = [str(old.index(int(i))) for i in ids if int(i) in old]
        if kept: rows.append(' '.join([path, *kept]))
    (out / f'{split}.txt').write_text(''.join(f'{row}\n' for row in draw.sample(rows, size)))
