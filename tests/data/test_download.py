"Preparing a benchmark from a small web server of our own"
import hashlib
import http.server
import io
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import requests
from helpers import SHARED
from PIL import Image

from cprfl.data.benchmarks import load_benchmark
from cprfl.data.download import SOURCES, Archive, PrepareError, Source, digest, fetch, prepare_benchmark

TRAIN = [f'train2017/{i}.jpg' for i in range(6)]
TEST = [f'val2017/{i}.jpg' for i in range(4)]
VOC12 = [f'VOCdevkit/VOC2012/JPEGImages/{i}.jpg' for i in range(5)]
VOC07 = [f'VOCdevkit/VOC2007/JPEGImages/{i}.jpg' for i in range(3)]


def jpeg(seed, size=40):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(out, 'jpeg', quality=95)
    return out.getvalue()


class Web:
    "A server of named bytes that understands Range, counts requests and fails on demand"
    def __init__(self):
        self.files, self.requests, self.cut, self.codes, self.ranges, self.lock = {}, [], {}, {}, True, threading.Lock()
        web = self
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self): web.answer(self)
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()

    def answer(self, h):
        span, data = h.headers.get('Range'), self.files.get(h.path)
        with self.lock:
            self.requests.append((h.path, span))
            code = self.codes[h.path].pop(0) if self.codes.get(h.path) else None
            cut = self.cut[h.path].pop(0) if self.cut.get(h.path) else None
        if data is None or code: return h.send_error(code or 404)
        start = int(span.removeprefix('bytes=').rstrip('-')) if span and self.ranges else 0
        if start >= len(data) and start:
            h.send_response(416)
            h.send_header('Content-Range', f'bytes */{len(data)}')
            h.send_header('Content-Length', '0')
            return h.end_headers()
        h.send_response(206 if start else 200)
        if start: h.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        h.send_header('Content-Length', str(len(data) - start))
        h.end_headers()
        h.wfile.write(data[start:] if cut is None else data[start:start + cut])  # cut: fewer bytes than announced, then the line breaks

    def paths(self): return [p for p, _ in self.requests]
    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def sha(text): return hashlib.sha256(text).hexdigest()


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    w = Web()
    yield w
    w.stop()


@pytest.fixture
def coco(web):
    lists = {'coco_labels.txt': b'cat 0\r\nhot dog 1',
             'coco_lt_train.txt': ''.join(f'{p} {i % 2} \n' for i, p in enumerate(TRAIN)).encode(),
             'coco_lt_test.txt': ''.join(f'{p}\n' for p in TEST).encode()}
    web.files |= {f'/lists/{k}': v for k, v in lists.items()} | {f'/{p}': jpeg(i) for i, p in enumerate(TRAIN + TEST)}
    return {'coco-lt': Source(f'{web.url}/lists', {k: sha(v) for k, v in lists.items()}, images_url=web.url)}


def tar_of(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo('VOCdevkit/VOC2007/JPEGImages/link.jpg')
        link.type, link.linkname = tarfile.SYMTYPE, '/etc/hostname'
        tar.addfile(link)
    return out.getvalue()


@pytest.fixture
def voc(web):
    lists = {'voc_lt_train.txt': '\n'.join(f'{p} 0' for p in VOC12).encode(),
             'voc_lt_test.txt': '\n'.join(f'{p} 1' for p in VOC07).encode(),
             'voc_labels.txt': b'bird 0\ncat 1'}
    extra = {'VOCdevkit/VOC2012/JPEGImages/unlisted.jpg': jpeg(50), '../../escaped.jpg': jpeg(51)}
    tars = {'/a.tar': tar_of({p: jpeg(i, 90) for i, p in enumerate(VOC12)} | extra),
            '/b.tar': tar_of({p: jpeg(i) for i, p in enumerate(VOC07)})}
    web.files |= tars | {f'/lists/{k}': v for k, v in lists.items()}
    holds = 'VOCdevkit/VOC2012/', 'VOCdevkit/VOC2007/'
    archives = tuple(Archive(web.url + k, hashlib.md5(v).hexdigest(), h) for (k, v), h in zip(tars.items(), holds))
    return {'voc-lt': Source(f'{web.url}/lists', {k: sha(v) for k, v in lists.items()}, archives=archives)}


def go(name, root, sources, **kw): return prepare_benchmark(name, root, sources=sources, **{'wait': 0, 'workers': 3, **kw})


def parts(root): return [p.name for p in Path(root).rglob('*.part')]


# ---- one file

def test_fetch_goes_on_where_it_was_cut(web, tmp_path):
    data = np.random.default_rng(0).bytes(400_000)
    web.files['/big'], web.cut['/big'] = data, [150_000, 100_000]
    with requests.Session() as s: fetch(s, f'{web.url}/big', tmp_path/'big', wait=0)
    assert (tmp_path/'big').read_bytes() == data and not parts(tmp_path)
    spans = [s for _, s in web.requests]
    assert spans[0] is None and len(spans) == 3
    starts = [int(s[6:-1]) for s in spans[1:]]
    assert 0 < starts[0] < starts[1] < len(data)


@pytest.mark.parametrize('ranges', [True, False])
@pytest.mark.parametrize('kind', ['half', 'all', 'longer', 'other'])
def test_fetch_copes_with_any_part_left_over(web, tmp_path, kind, ranges):
    data = np.random.default_rng(1).bytes(100_000)
    web.files['/f'], web.ranges = data, ranges
    left = {'half': data[:50_000], 'all': data, 'longer': data + b'junk', 'other': b'x' * 50_000}[kind]
    (tmp_path/'f.part').write_bytes(left)
    def check(f): return None if f.read_bytes() == data else 'differs'
    with requests.Session() as s: fetch(s, f'{web.url}/f', tmp_path/'f', check, wait=0)
    assert (tmp_path/'f').read_bytes() == data and not parts(tmp_path)
    if kind == 'half' and ranges: assert web.requests == [('/f', 'bytes=50000-')]


def test_fetch_retries_what_may_pass_and_nothing_else(web, tmp_path):
    web.files['/f'], web.codes['/f'] = b'data', [503, 429]
    with requests.Session() as s:
        fetch(s, f'{web.url}/f', tmp_path/'f', wait=0)
        assert web.paths() == ['/f'] * 3
        with pytest.raises(PrepareError, match='404'): fetch(s, f'{web.url}/none', tmp_path/'none', wait=0)
        assert web.paths().count('/none') == 1
        with pytest.raises(PrepareError, match='wrong'): fetch(s, f'{web.url}/f', tmp_path/'g', lambda f: 'wrong', retries=3, wait=0)
    assert web.paths().count('/f') == 6 and not (tmp_path/'g').exists() and not parts(tmp_path)


# ---- COCO: one image at a time

def test_coco_from_nothing_then_again(web, coco, tmp_path):
    done = go('coco-lt', tmp_path, coco)
    assert done.images == {'train': 6, 'test': 4} and (done.already, done.linked, done.fetched) == (0, 0, 10)
    assert 'coco-lt is ready' in str(done) and '6 train and 4 test' in str(done)
    assert (tmp_path/'coco-lt'/TRAIN[3]).read_bytes() == web.files[f'/{TRAIN[3]}'] and not parts(tmp_path)
    asked = len(web.requests)
    again = go('coco-lt', tmp_path, coco)
    assert len(web.requests) == asked == 13 and again.already == 10
    train, test = (load_benchmark('coco-lt', s, root=tmp_path, check='full') for s in ('train', 'test'))
    assert train.class_counts.tolist() == [3, 3] and train.classes == ['cat', 'hot dog'] and test.class_counts.tolist() == [0, 0]


def test_interrupted_run_goes_on(web, coco, tmp_path):
    web.codes[f'/{TRAIN[2]}'] = [503] * 2
    web.codes[f'/{TEST[1]}'] = [404]
    with pytest.raises(PrepareError) as e: go('coco-lt', tmp_path, coco, retries=2)
    for p in (TRAIN[2], TEST[1]): assert f'{web.url}/{p}' in str(e.value) and str(tmp_path/'coco-lt'/p) in str(e.value)
    assert TRAIN[1] not in str(e.value) and '--images DIR' in str(e.value)
    web.requests.clear()
    done = go('coco-lt', tmp_path, coco)
    assert (done.already, done.fetched) == (8, 2) and sorted(web.paths()) == sorted([f'/{TRAIN[2]}', f'/{TEST[1]}'])


def test_damaged_and_empty_images_are_fetched_again(web, coco, tmp_path):
    go('coco-lt', tmp_path, coco)
    web.requests.clear()
    for p, n in ((TRAIN[0], 300), (TEST[2], 0)):
        file = tmp_path/'coco-lt'/p
        file.write_bytes(file.read_bytes()[:n])
    (tmp_path/'coco-lt'/(TRAIN[0] + '.part')).write_bytes(b'rubbish from long ago')
    done = go('coco-lt', tmp_path, coco)
    assert done.fetched == 2 and sorted(web.paths()) == sorted([f'/{TRAIN[0]}', f'/{TEST[2]}'])
    assert (tmp_path/'coco-lt'/TRAIN[0]).read_bytes() == web.files[f'/{TRAIN[0]}']


def test_an_error_page_is_no_image(web, coco, tmp_path):
    good, web.files[f'/{TEST[0]}'] = web.files[f'/{TEST[0]}'], b'<html>please log in</html>'
    with pytest.raises(PrepareError, match='broken'): go('coco-lt', tmp_path, coco, retries=2)
    assert not (tmp_path/'coco-lt'/TEST[0]).exists() and not parts(tmp_path)
    web.files[f'/{TEST[0]}'] = good
    assert go('coco-lt', tmp_path, coco).fetched == 1


def test_many_failures_end_early_and_go_to_a_file(web, coco, tmp_path):
    paths = [f'train2017/{i:03d}.jpg' for i in range(200)]
    text = ''.join(f'{p} 0\n' for p in paths).encode()
    web.files['/lists/coco_lt_train.txt'] = text
    coco['coco-lt'].lists['coco_lt_train.txt'] = sha(text)
    with pytest.raises(PrepareError) as e: go('coco-lt', tmp_path, coco)
    assert sum(p.startswith('/train2017') for p in web.paths()) < 60
    rows = [r.split('\t') for r in (tmp_path/'coco-lt/missing.tsv').read_text().splitlines()]
    assert {(u, f) for u, f in rows} >= {(f'{web.url}/{p}', str(tmp_path/'coco-lt'/p)) for p in paths}
    assert 'missing.tsv' in str(e.value) and len(str(e.value).splitlines()) < 20
    web.files |= {f'/{p}': jpeg(1) for p in paths}
    go('coco-lt', tmp_path, coco)
    assert not (tmp_path/'coco-lt/missing.tsv').exists()


def test_images_from_a_folder_are_linked(web, coco, tmp_path):
    have = tmp_path/'have'
    for p in TRAIN + TEST[1:]:
        (have/p).parent.mkdir(parents=True, exist_ok=True)
        (have/p).write_bytes(web.files[f'/{p}'])
    (have/TRAIN[4]).write_bytes(web.files[f'/{TRAIN[4]}'][:400])
    before = sorted((f, f.read_bytes()) for f in have.rglob('*.jpg'))
    done = go('coco-lt', tmp_path/'data', coco, images=have)
    assert (done.linked, done.fetched) == (8, 2)
    assert (tmp_path/'data/coco-lt'/TRAIN[0]).resolve() == (have/TRAIN[0]).resolve()
    assert not (tmp_path/'data/coco-lt'/TRAIN[4]).is_symlink()
    assert sorted((f, f.read_bytes()) for f in have.rglob('*.jpg')) == before
    assert len(load_benchmark('coco-lt', 'train', root=tmp_path/'data')) == 6
    wrong = {tmp_path/'data/coco-lt/lists': 'holds none of the 10 images', tmp_path/'nowhere': 'given as images is not there'}
    for images, why in wrong.items():
        with pytest.raises(PrepareError, match=why): go('coco-lt', tmp_path/'other', coco, images=images)


# ---- lists

def test_wrong_checksums_are_refused(web, coco, tmp_path):
    good, web.files['/lists/coco_labels.txt'] = web.files['/lists/coco_labels.txt'], b'dog 0\r\ncat 1'
    with pytest.raises(PrepareError, match=r'sha256 is [0-9a-f]{64}, expected'): go('coco-lt', tmp_path, coco, retries=2)
    assert not (tmp_path/'coco-lt/lists/coco_labels.txt').exists() and not parts(tmp_path)
    mine = tmp_path/'mine'
    mine.mkdir()
    for name in coco['coco-lt'].lists: (mine/name).write_bytes(web.files[f'/lists/{name}'])
    with pytest.raises(PrepareError, match="mine/coco_labels.txt is not the benchmark's list"):
        go('coco-lt', tmp_path, coco, lists=mine)
    (mine/'coco_labels.txt').unlink()
    with pytest.raises(PrepareError, match='has no coco_labels.txt; expected'): go('coco-lt', tmp_path, coco, lists=mine)
    (mine/'coco_labels.txt').write_bytes(good)
    web.requests.clear()
    go('coco-lt', tmp_path, coco, lists=mine)
    assert not any(p.startswith('/lists') for p in web.paths())


def test_an_edited_list_is_fetched_again(web, coco, tmp_path):
    go('coco-lt', tmp_path, coco)
    (tmp_path/'coco-lt/lists/coco_lt_train.txt').write_text('train2017/1.jpg 1\n')
    go('coco-lt', tmp_path, coco)
    assert (tmp_path/'coco-lt/lists/coco_lt_train.txt').read_bytes() == web.files['/lists/coco_lt_train.txt']


def test_a_list_that_leads_out_is_refused(web, coco, tmp_path):
    text = b'../../evil.jpg 0\n'
    web.files['/lists/coco_lt_train.txt'] = text
    coco['coco-lt'].lists['coco_lt_train.txt'] = sha(text)
    with pytest.raises(PrepareError, match='leads out of its folder'): go('coco-lt', tmp_path, coco)


# ---- VOC: tar files

def test_voc_unpacks_only_what_is_listed(web, voc, tmp_path):
    root = tmp_path/'deep/data'
    done = go('voc-lt', root, voc)
    assert done.images == {'train': 5, 'test': 3} and done.fetched == 8 and not parts(tmp_path)
    found = sorted(p.relative_to(root/'voc-lt').as_posix() for p in (root/'voc-lt').rglob('*.jpg'))
    assert found == sorted(VOC12 + VOC07) and not list(tmp_path.rglob('escaped.jpg'))
    web.requests.clear()
    (root/'voc-lt'/VOC07[1]).unlink()
    assert go('voc-lt', root, voc, offline=True).fetched == 1 and not web.requests
    assert load_benchmark('voc-lt', 'test', root=root).classes == ['bird', 'cat']


def test_voc_tar_resumes_and_is_verified(web, voc, tmp_path):
    data = web.files['/a.tar']
    down = tmp_path/'voc-lt/downloads'
    down.mkdir(parents=True)
    (down/'a.tar.part').write_bytes(data[:20_000])
    (down/'b.tar').write_bytes(web.files['/b.tar'][:5_000])
    go('voc-lt', tmp_path, voc)
    assert ('/a.tar', 'bytes=20000-') in web.requests and ('/b.tar', 'bytes=5000-') in web.requests
    assert (down/'a.tar').read_bytes() == data


def test_voc_wrong_tar_is_refused(web, voc, tmp_path):
    web.files['/b.tar'] += b'more'
    with pytest.raises(PrepareError, match=r'md5 is [0-9a-f]{32}, expected') as e: go('voc-lt', tmp_path, voc, retries=2)
    assert f'{web.url}/b.tar' in str(e.value) and str(tmp_path/'voc-lt/downloads/b.tar') in str(e.value) and 'a.tar' not in str(e.value)
    assert len(list((tmp_path/'voc-lt/VOCdevkit/VOC2012').rglob('*.jpg'))) == 5 and not parts(tmp_path)


def test_voc_devkit_elsewhere(web, voc, tmp_path):
    for i, p in enumerate(VOC12 + VOC07):
        (tmp_path/'have'/p).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'have'/p).write_bytes(jpeg(i))
    for n, images in enumerate((tmp_path/'have', tmp_path/'have/VOCdevkit')):
        assert go('voc-lt', tmp_path/str(n), voc, images=images).linked == 8
    assert '/a.tar' not in web.paths()


# ---- no network

@pytest.mark.parametrize('offline', [True, False])
def test_without_a_network_the_message_says_it_all(web, coco, voc, tmp_path, offline):
    web.stop()
    why = 'the network is not used' if offline else 'cannot reach 127.0.0.1'
    for name, source in (coco | voc).items():
        with pytest.raises(PrepareError) as e: go(name, tmp_path, {name: source}, offline=offline, retries=2)
        text = str(e.value)
        assert why in text and '--lists DIR' in text and '--images DIR' in text
        for f, s in source.lists.items(): assert f"{source.lists_url}/{f}\n    -> {tmp_path/name/'lists'/f}  (sha256 {s})" in text
        for a in source.archives: assert f"{a.url}\n    -> {tmp_path/name/'downloads'/Path(a.url).name}  (md5 {a.md5})" in text
        if not source.archives: assert f'{web.url}/PATH' in text


def test_files_put_in_place_by_hand(web, voc, tmp_path):
    base = tmp_path/'voc-lt'
    for d in ('lists', 'downloads'): (base/d).mkdir(parents=True)
    for path, data in web.files.items(): (base/('downloads' if path.endswith('.tar') else 'lists')/Path(path).name).write_bytes(data)
    (base/'downloads/b.tar').write_bytes(b'half')
    with pytest.raises(PrepareError, match='b.tar is there, but its md5 is'): go('voc-lt', tmp_path, voc, offline=True)
    (base/'downloads/b.tar').write_bytes(web.files['/b.tar'])
    assert go('voc-lt', tmp_path, voc, offline=True).images == {'train': 5, 'test': 3} and not web.requests


def test_names_and_places_that_cannot_be(tmp_path):
    with pytest.raises(PrepareError, match="'lvis', available: voc-lt, coco-lt"): prepare_benchmark('lvis', tmp_path)
    with pytest.raises(PrepareError, match='nothing to prepare'): prepare_benchmark('shapes-lt', tmp_path)
    (tmp_path/'file').write_text('in the way')
    lists = tmp_path/'lists'
    lists.mkdir()
    source = Source('http://127.0.0.1:9', {'x_labels.txt': sha(b'a 0')})
    (lists/'x_labels.txt').write_bytes(b'a 0')
    with pytest.raises(PrepareError, match='cannot write below'):
        prepare_benchmark('x', tmp_path/'file', lists, sources={'x': source}, offline=True)


@pytest.mark.skipif(not (SHARED/'lists').is_dir(), reason='the benchmark lists are not here (set CPRFL_SHARED)')
def test_checksums_are_those_of_the_benchmark_lists(tmp_path):
    for source in SOURCES.values():
        assert {f: digest(SHARED/'lists'/f) for f in source.lists} == source.lists
    with pytest.raises(PrepareError) as e: prepare_benchmark('coco-lt', tmp_path, lists=SHARED/'lists', offline=True)
    assert 'http://images.cocodataset.org/train2017/000000' in str(e.value) and 'and 6,903 more; all 6,909 are in' in str(e.value)
    with pytest.raises(PrepareError) as e: prepare_benchmark('voc-lt', tmp_path, lists=SHARED/'lists', offline=True)
    assert 'VOCtrainval_11-May-2012.tar' in str(e.value) and 'b6e924de25625d8de591ea690078ad9f' in str(e.value)
