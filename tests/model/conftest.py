import json

import pytest
import torch

TOWERS = {'tiny-cprfl-rn': dict(layers=[1, 1, 1, 1], width=8, head_width=16, image_size=64),
          'tiny-cprfl-vit': dict(layers=2, width=32, head_width=16, patch_size=16, image_size=64)}


@pytest.fixture(scope='session')
def clip_files(tmp_path_factory):
    "Two architectures that open_clip did not know, with randomly initialised weights in files"
    import open_clip
    folder, files = tmp_path_factory.mktemp('clip'), {}
    for name, vision in TOWERS.items():
        text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
        (folder / f'{name}.json').write_text(json.dumps(dict(embed_dim=16, vision_cfg=vision, text_cfg=text)))
        open_clip.add_model_config(folder / f'{name}.json')
        torch.manual_seed(0)
        files[name] = folder / f'{name}.pt'
        torch.save(open_clip.create_model(name).state_dict(), files[name])
    return files


@pytest.fixture(scope='session')
def clip_sources(clip_files): return {name: f'clip:{name}/{file}' for name, file in clip_files.items()}
