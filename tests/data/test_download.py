"Preparing a benchmark from a small web server of our own"
import errno
import gzip
import hashlib
import http.server
import io
import os
import re
import tarfile
import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from filelock import FileLock
from pictures import noise
from PIL import Image

from cprfl.data.benchmarks import load_benchmark
from cprfl.data.download import SOURCES, Archive, PrepareError, Source, digest, fetch, prepare_benchmark

TRAIN = [f'train2017/{i}.jpg' for i in range(6)]
TEST = [f'val2017/{i}.jpg' for i in range(4)]
VOC12 = [f'VOCdevkit/VOC2012/JPEGImages/{i}.jpg' for i in range(5)]
VOC07 = [f'VOCdevkit/VOC2007/JPEGImages/{i}.jpg' for i in range(3)]


def jpeg(seed, size=40):
    out = io.BytesIO()
    Image.fromarray(noise(seed, size)).save(out, 'jpeg', quality=95)
    return out.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self): self.server.web.answer(self)


class Web:
    "A server of named bytes that understands Range, counts requests and fails on demand"
    def __init__(self):
        self.files, self.requests, self.ranges = {}, [], True
        self.codes, self.cuts = defaultdict(list), defaultdict(list) # what goes wrong next, by path
        self.lock = threading.Lock()
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.web = self
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()

    def answer(self, handler):
        path, span = handler.path, handler.headers.get('Range')
        with self.lock:
            self.requests.append((path, span))
            code = self.codes[path].pop(0) if self.codes[path] else None
            cut = self.cuts[path].pop(0) if self.cuts[path] else None
        data = self.files.get(path)
        if data is None or code: return handler.send_error(code or 404)
        start = int(span.removeprefix('bytes=').rstrip('-')) if span and self.ranges else 0
        if start and start >= len(data): self.send(handler, 416, f'bytes */{len(data)}', b'')
        elif start: self.send(handler, 206, f'bytes {start}-{len(data) - 1}/{len(data)}', data[start:], cut)
        else: self.send(handler, 200, None, data, cut)

    def send(self, handler, code, span, data, cut=None):
        "With `cut`: fewer bytes than announced, then the line breaks"
        handler.send_response(code)
        if span: handler.send_header('Content-Range', span)
        handler.send_header('Content-Length', str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:cut])

    def paths(self): return [path for path, _ in self.requests]

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def sha(text): return hashlib.sha256(text).hexdigest()


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    web = Web()
    yield web
    web.stop()


@pytest.fixture
def session():
    with requests.Session() as session: yield session


def serve_lists(web, lists):
    "Checksums of lists that the server has from now on"
    web.files |= {f'/lists/{name}': data for name, data in lists.items()}
    return {name: sha(data) for name, data in lists.items()}


@pytest.fixture
def coco(web):
    "A COCO-LT of ten images"
    lists = serve_lists(web, {
        'coco_labels.txt': b'cat 0\r\nhot dog 1',
        'coco_lt_train.txt': ''.join(f'{path} {i % 2} \n' for i, path in enumerate(TRAIN)).encode(),
        'coco_lt_test.txt': ''.join(f'{path}\n' for path in TEST).encode(),
    })
    web.files |= {f'/{path}': jpeg(i) for i, path in enumerate(TRAIN + TEST)}
    return {'coco-lt': Source(f'{web.url}/lists', lists, images_url=web.url)}


def tar_of(members):
    "A tar file of these members, and of a link that leads out"
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
    "A VOC-LT of eight images in two tar files"
    lists = serve_lists(web, {
        'voc_lt_train.txt': '\n'.join(f'{path} 0' for path in VOC12).encode(),
        'voc_lt_test.txt': '\n'.join(f'{path} 1' for path in VOC07).encode(),
        'voc_labels.txt': b'bird 0\ncat 1',
    })
    unlisted = {'VOCdevkit/VOC2012/JPEGImages/unlisted.jpg': jpeg(50), '../../escaped.jpg': jpeg(51)}
    voc12 = {path: jpeg(i, 90) for i, path in enumerate(VOC12)}
    voc07 = {path: jpeg(i) for i, path in enumerate(VOC07)}
    tars = {
        'VOCdevkit/VOC2012/': ('/a.tar', tar_of(voc12 | unlisted)),
        'VOCdevkit/VOC2007/': ('/b.tar', tar_of(voc07)),
    }
    web.files |= dict(tars.values())
    md5 = {at: hashlib.md5(data).hexdigest() for at, data in tars.values()}
    archives = [Archive(web.url + at, md5[at], holds) for holds, (at, _) in tars.items()]
    return {'voc-lt': Source(f'{web.url}/lists', lists, archives=tuple(archives))}


def go(name, root, sources, **kw):
    return prepare_benchmark(name, root, sources=sources, workers=3, wait=0, **kw)


def parts(root): return [p.name for p in Path(root).rglob('*.part')]


def failure(name, root, sources, **kw):
    "The message of a preparation that fails"
    with pytest.raises(PrepareError) as e: go(name, root, sources, **kw)
    return str(e.value)


# ---- one file

def test_fetch_goes_on_where_it_was_cut(web, session, tmp_path):
    data = noise(0, 400).tobytes()
    web.files['/big'], web.cuts['/big'] = data, [150_000, 100_000]
    fetch(session, f'{web.url}/big', tmp_path/'big', wait=0)
    assert (tmp_path/'big').read_bytes() == data
    assert not parts(tmp_path)
    first, *spans = [span for _, span in web.requests]
    assert first is None
    second, third = (int(span.removeprefix('bytes=').rstrip('-')) for span in spans)
    assert 0 < second < third < len(data)


@pytest.mark.parametrize('ranges', [True, False])
@pytest.mark.parametrize('kind', ['half', 'all', 'longer', 'other'])
def test_fetch_copes_with_any_part_left_over(web, session, tmp_path, kind, ranges):
    data = noise(1, 200).tobytes()
    web.files['/f'], web.ranges = data, ranges
    left = {'half': data[:50_000], 'all': data, 'longer': data + b'junk', 'other': b'x' * 50_000}[kind]
    (tmp_path/'f.part').write_bytes(left)

    def check(file): return None if file.read_bytes() == data else 'differs'

    fetch(session, f'{web.url}/f', tmp_path/'f', check, wait=0)
    assert (tmp_path/'f').read_bytes() == data
    assert not parts(tmp_path)
    if (kind, ranges) == ('half', True): assert web.requests == [('/f', 'bytes=50000-')]


def test_fetch_retries_what_may_pass(web, session, tmp_path):
    web.files['/f'], web.codes['/f'] = b'data', [503, 429]
    fetch(session, f'{web.url}/f', tmp_path/'f', wait=0)
    assert web.paths() == ['/f'] * 3


def test_fetch_does_not_repeat_what_will_not_pass(web, session, tmp_path):
    with pytest.raises(PrepareError, match='404'): fetch(session, f'{web.url}/none', tmp_path/'none', wait=0)
    assert web.paths() == ['/none']


def test_fetch_deletes_what_fails_its_check(web, session, tmp_path):
    web.files['/f'] = b'data'
    with pytest.raises(PrepareError, match='wrong'):
        fetch(session, f'{web.url}/f', tmp_path/'g', lambda f: 'wrong', retries=3, wait=0)
    assert web.paths() == ['/f'] * 3
    assert not list(tmp_path.iterdir())


# ---- COCO: one image at a time

def test_coco_from_nothing(web, coco, tmp_path):
    done = go('coco-lt', tmp_path, coco)
    assert done.images == {'train': 6, 'test': 4}
    assert (done.already, done.linked, done.fetched) == (0, 0, 10)
    assert 'coco-lt is ready' in str(done)
    assert '6 train and 4 test' in str(done)
    assert (tmp_path/'coco-lt'/TRAIN[3]).read_bytes() == web.files[f'/{TRAIN[3]}']
    assert not parts(tmp_path)


def test_a_second_run_asks_for_nothing(web, coco, tmp_path):
    go('coco-lt', tmp_path, coco)
    assert len(web.requests) == 13
    assert go('coco-lt', tmp_path, coco).already == 10
    assert len(web.requests) == 13


@pytest.mark.parametrize('split, counts', [('train', [3, 3]), ('test', [0, 0])])
def test_what_was_prepared_can_be_loaded(coco, tmp_path, split, counts):
    go('coco-lt', tmp_path, coco)
    ds = load_benchmark('coco-lt', split, root=tmp_path, check='full')
    assert ds.class_counts.tolist() == counts
    assert ds.classes == ['cat', 'hot dog']


def test_an_interrupted_run_names_what_is_missing(web, coco, tmp_path):
    web.codes[f'/{TRAIN[2]}'], web.codes[f'/{TEST[1]}'] = [503] * 2, [404]
    text = failure('coco-lt', tmp_path, coco, retries=2)
    for path in (TRAIN[2], TEST[1]):
        assert f'{web.url}/{path}' in text
        assert str(tmp_path/'coco-lt'/path) in text
    assert TRAIN[1] not in text
    assert '--images DIR' in text


def test_an_interrupted_run_goes_on(web, coco, tmp_path):
    web.codes[f'/{TRAIN[2]}'], web.codes[f'/{TEST[1]}'] = [503] * 2, [404]
    failure('coco-lt', tmp_path, coco, retries=2)
    web.requests.clear()
    done = go('coco-lt', tmp_path, coco)
    assert (done.already, done.fetched) == (8, 2)
    assert sorted(web.paths()) == sorted([f'/{TRAIN[2]}', f'/{TEST[1]}'])


def test_damaged_and_empty_images_are_fetched_again(web, coco, tmp_path):
    go('coco-lt', tmp_path, coco)
    web.requests.clear()
    for path, n in ((TRAIN[0], 300), (TEST[2], 0)):
        file = tmp_path/'coco-lt'/path
        file.write_bytes(file.read_bytes()[:n])
    (tmp_path/'coco-lt'/(TRAIN[0] + '.part')).write_bytes(b'rubbish from long ago')
    assert go('coco-lt', tmp_path, coco).fetched == 2
    assert sorted(web.paths()) == sorted([f'/{TRAIN[0]}', f'/{TEST[2]}'])
    assert (tmp_path/'coco-lt'/TRAIN[0]).read_bytes() == web.files[f'/{TRAIN[0]}']


def test_an_error_page_is_no_image(web, coco, tmp_path):
    good, web.files[f'/{TEST[0]}'] = web.files[f'/{TEST[0]}'], b'<html>please log in</html>'
    assert 'image is HTML' in failure('coco-lt', tmp_path, coco, retries=2)
    assert not (tmp_path/'coco-lt'/TEST[0]).exists()
    assert not parts(tmp_path)
    web.files[f'/{TEST[0]}'] = good
    assert go('coco-lt', tmp_path, coco).fetched == 1


@pytest.fixture
def unavailable(web, coco):
    "200 listed images that the server does not have"
    paths = [f'train2017/{i:03d}.jpg' for i in range(200)]
    lists = serve_lists(web, {'coco_lt_train.txt': ''.join(f'{path} 0\n' for path in paths).encode()})
    coco['coco-lt'].lists.update(lists)
    return paths


def test_many_failures_end_early(web, coco, unavailable, tmp_path):
    failure('coco-lt', tmp_path, coco)
    assert sum(path.startswith('/train2017') for path in web.paths()) < 60


def test_many_failures_go_to_a_file(web, coco, unavailable, tmp_path):
    text = failure('coco-lt', tmp_path, coco)
    assert 'missing.tsv' in text
    assert len(text.splitlines()) < 20
    rows = [tuple(row.split('\t')) for row in (tmp_path/'coco-lt/missing.tsv').read_text().splitlines()]
    assert rows[:200] == [(f'{web.url}/{path}', str(tmp_path/'coco-lt'/path)) for path in unavailable]


def test_the_file_of_failures_goes_when_all_is_there(web, coco, unavailable, tmp_path):
    failure('coco-lt', tmp_path, coco)
    web.files |= {f'/{path}': jpeg(1) for path in unavailable}
    go('coco-lt', tmp_path, coco)
    assert not (tmp_path/'coco-lt/missing.tsv').exists()


# ---- COCO: images that are there already

@pytest.fixture
def have(web, coco, tmp_path):
    "A folder with eight of the ten images, and half of another"
    folder = tmp_path/'have'
    for path in TRAIN + TEST[1:]:
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        (folder/path).write_bytes(web.files[f'/{path}'])
    (folder/TRAIN[4]).write_bytes(web.files[f'/{TRAIN[4]}'][:400])
    return folder


def test_images_from_a_folder_are_linked(coco, have, tmp_path):
    done = go('coco-lt', tmp_path/'data', coco, images=have)
    assert (done.linked, done.fetched) == (8, 2)
    assert (tmp_path/'data/coco-lt'/TRAIN[0]).resolve() == (have/TRAIN[0]).resolve()
    assert not (tmp_path/'data/coco-lt'/TRAIN[4]).is_symlink()
    assert len(load_benchmark('coco-lt', 'train', root=tmp_path/'data')) == 6


def test_the_folder_of_images_stays_as_it_was(coco, have, tmp_path):
    before = {file: file.read_bytes() for file in have.rglob('*.*')}
    go('coco-lt', tmp_path/'data', coco, images=have)
    assert {file: file.read_bytes() for file in have.rglob('*.*')} == before


def test_a_damaged_image_is_replaced_by_a_link(web, coco, have, tmp_path):
    image = tmp_path/'data/coco-lt'/TRAIN[0]
    image.parent.mkdir(parents=True)
    image.write_bytes(b'half')
    go('coco-lt', tmp_path/'data', coco, images=have)
    assert image.is_symlink()
    assert image.read_bytes() == web.files[f'/{TRAIN[0]}']


@pytest.mark.parametrize('images, why', [
    ('empty', 'holds none of the 10 images'), ('nowhere', 'given as images is not there')])
def test_a_folder_without_the_images_is_refused(coco, tmp_path, images, why):
    (tmp_path/'empty').mkdir()
    assert why in failure('coco-lt', tmp_path/'data', coco, images=tmp_path/images)


# ---- lists

def test_a_list_with_a_wrong_checksum_is_refused(web, coco, tmp_path):
    web.files['/lists/coco_labels.txt'] = b'dog 0\r\ncat 1'
    text = failure('coco-lt', tmp_path, coco, retries=2)
    assert re.search('sha256 is [0-9a-f]{64}, expected', text)
    assert not (tmp_path/'coco-lt/lists/coco_labels.txt').exists()
    assert not parts(tmp_path)


@pytest.fixture
def mine(web, coco, tmp_path):
    "A folder with the lists"
    folder = tmp_path/'mine'
    folder.mkdir()
    for name in coco['coco-lt'].lists: (folder/name).write_bytes(web.files[f'/lists/{name}'])
    return folder


def test_lists_from_a_folder_are_copied(web, coco, mine, tmp_path):
    go('coco-lt', tmp_path, coco, lists=mine)
    assert not any(path.startswith('/lists') for path in web.paths())


def test_another_list_in_the_folder_is_refused(coco, mine, tmp_path):
    (mine/'coco_labels.txt').write_bytes(b'dog 0\r\ncat 1')
    text = failure('coco-lt', tmp_path, coco, lists=mine)
    assert "mine/coco_labels.txt is not the benchmark's list" in text


def test_a_folder_without_a_list_is_refused(coco, mine, tmp_path):
    (mine/'coco_labels.txt').unlink()
    assert 'has no coco_labels.txt; expected' in failure('coco-lt', tmp_path, coco, lists=mine)


def test_an_edited_list_is_fetched_again(web, coco, tmp_path):
    go('coco-lt', tmp_path, coco)
    (tmp_path/'coco-lt/lists/coco_lt_train.txt').write_text('train2017/1.jpg 1\n')
    go('coco-lt', tmp_path, coco)
    assert (tmp_path/'coco-lt/lists/coco_lt_train.txt').read_bytes() == web.files['/lists/coco_lt_train.txt']


def test_a_list_that_leads_out_is_refused(web, coco, tmp_path):
    coco['coco-lt'].lists.update(serve_lists(web, {'coco_lt_train.txt': b'../../evil.jpg 0\n'}))
    assert 'leads out of its folder' in failure('coco-lt', tmp_path, coco)


# ---- VOC: tar files

def test_voc_unpacks_only_what_is_listed(voc, tmp_path):
    root = tmp_path/'deep/data'
    done = go('voc-lt', root, voc)
    assert done.images == {'train': 5, 'test': 3}
    assert done.fetched == 8
    assert not parts(tmp_path)
    images = [p.relative_to(root/'voc-lt').as_posix() for p in (root/'voc-lt').rglob('*.jpg')]
    assert sorted(images) == sorted(VOC12 + VOC07)
    assert not list(tmp_path.rglob('escaped.jpg'))
    assert load_benchmark('voc-lt', 'test', root=root).classes == ['bird', 'cat']


def test_a_lost_image_comes_from_the_tar_file_again(web, voc, tmp_path):
    go('voc-lt', tmp_path, voc)
    web.requests.clear()
    (tmp_path/'voc-lt'/VOC07[1]).unlink()
    assert go('voc-lt', tmp_path, voc, offline=True).fetched == 1
    assert not web.requests


def test_half_a_tar_file_is_completed(web, voc, tmp_path):
    downloads = tmp_path/'voc-lt/downloads'
    downloads.mkdir(parents=True)
    (downloads/'a.tar.part').write_bytes(web.files['/a.tar'][:20_000])
    (downloads/'b.tar').write_bytes(web.files['/b.tar'][:5_000])
    go('voc-lt', tmp_path, voc)
    assert {('/a.tar', 'bytes=20000-'), ('/b.tar', 'bytes=5000-')} <= set(web.requests)
    assert (downloads/'a.tar').read_bytes() == web.files['/a.tar']


def test_a_wrong_tar_file_is_refused(web, voc, tmp_path):
    web.files['/b.tar'] += b'more'
    text = failure('voc-lt', tmp_path, voc, retries=2)
    assert re.search('md5 is [0-9a-f]{32}, expected', text)
    assert f'{web.url}/b.tar' in text
    assert str(tmp_path/'voc-lt/downloads/b.tar') in text
    assert 'a.tar' not in text
    assert len(list((tmp_path/'voc-lt/VOCdevkit/VOC2012').rglob('*.jpg'))) == 5
    assert not parts(tmp_path)


@pytest.mark.parametrize('images', ['have', 'have/VOCdevkit'])
def test_a_devkit_elsewhere_is_linked(web, voc, tmp_path, images):
    for i, path in enumerate(VOC12 + VOC07):
        (tmp_path/'have'/path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'have'/path).write_bytes(jpeg(i))
    assert go('voc-lt', tmp_path/'data', voc, images=tmp_path/images).linked == 8
    assert '/a.tar' not in web.paths()


def one_tar(voc, web, data):
    "VOC-LT whose b.tar is other bytes, with their checksum"
    web.files['/b.tar'] = data
    whole, small = voc['voc-lt'].archives
    archives = whole, replace(small, md5=hashlib.md5(data).hexdigest())
    return {'voc-lt': replace(voc['voc-lt'], archives=archives)}


def test_a_packed_tar_file_is_refused(web, voc, tmp_path):
    text = failure('voc-lt', tmp_path, one_tar(voc, web, gzip.compress(web.files['/b.tar'])))
    assert 'b.tar is no whole tar file' in text


def test_a_broken_tar_file_is_refused(web, voc, tmp_path):
    text = failure('voc-lt', tmp_path, one_tar(voc, web, web.files['/b.tar'][:2000]))
    assert 'b.tar is no whole tar file' in text


def test_a_member_larger_than_an_image_is_refused(web, voc, tmp_path):
    info = tarfile.TarInfo(VOC07[0])
    info.size = 1 << 40
    text = failure('voc-lt', tmp_path, one_tar(voc, web, info.tobuf() + bytes(1024)))
    assert f'{VOC07[0]!r} has 1,099,511,627,776 bytes, expected at most 67,108,864' in text


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_a_member_that_is_no_file_is_passed_over(web, voc, tmp_path, kind):
    info = tarfile.TarInfo(VOC07[0])
    info.type, info.linkname = kind, '/etc/hostname'
    failure('voc-lt', tmp_path, one_tar(voc, web, info.tobuf() + bytes(1024)))
    assert not os.path.lexists(tmp_path/'voc-lt'/VOC07[0])


def test_the_first_of_two_members_with_one_name_counts(web, voc, tmp_path):
    first = web.files['/b.tar']
    again = tar_of({path: b'other' for path in VOC07})
    sources = one_tar(voc, web, first.rstrip(bytes(1)) + bytes(-len(first.rstrip(bytes(1))) % 512) + again)
    assert go('voc-lt', tmp_path, sources).fetched == 8


def test_a_size_that_is_known_is_tested(web, voc, tmp_path):
    whole, small = voc['voc-lt'].archives
    sizes = whole, replace(small, size=len(web.files['/b.tar']) + 1)
    text = failure('voc-lt', tmp_path, {'voc-lt': replace(voc['voc-lt'], archives=sizes)}, retries=1)
    assert re.search(r'size is [\d,]+ bytes, expected', text)


def test_a_list_larger_than_known_is_not_read(web, coco, tmp_path):
    sizes = {name: 5 for name in coco['coco-lt'].lists}
    text = failure('coco-lt', tmp_path, {'coco-lt': replace(coco['coco-lt'], sizes=sizes)})
    assert 'expected at most 5' in text


# ---- no network

OFFLINE = pytest.mark.parametrize('offline, why', [
    (True, 'the network is not used'), (False, 'cannot reach 127.0.0.1')])


@OFFLINE
@pytest.mark.parametrize('kind, name', [('coco', 'coco-lt'), ('voc', 'voc-lt')])
def test_without_a_network_the_message_says_it_all(request, web, tmp_path, kind, name, offline, why):
    sources = request.getfixturevalue(kind)
    source = sources[name]
    web.stop()
    text = failure(name, tmp_path, sources, offline=offline, retries=2)
    for part in (why, '--lists DIR', '--images DIR'): assert part in text
    base = tmp_path/name
    for file, checksum in source.lists.items():
        assert f"{source.lists_url}/{file}\n    -> {base/'lists'/file}  (sha256 {checksum})" in text
    for archive in source.archives:
        assert f"{archive.url}\n    -> {base/'downloads'/Path(archive.url).name}  (md5 {archive.md5})" in text
    if source.images_url: assert f'{web.url}/PATH' in text


@pytest.fixture
def by_hand(web, voc, tmp_path):
    "All files of VOC-LT in their places, but b.tar is half"
    base = tmp_path/'voc-lt'
    for folder in ('lists', 'downloads'): (base/folder).mkdir(parents=True)
    for path, data in web.files.items():
        folder = 'downloads' if path.endswith('.tar') else 'lists'
        (base/folder/Path(path).name).write_bytes(data)
    (base/'downloads/b.tar').write_bytes(b'half')
    return base


def test_half_a_file_put_in_place_by_hand_is_refused(voc, by_hand, tmp_path):
    assert 'b.tar is there, but its md5 is' in failure('voc-lt', tmp_path, voc, offline=True)


def test_files_put_in_place_by_hand_are_used(web, voc, by_hand, tmp_path):
    (by_hand/'downloads/b.tar').write_bytes(web.files['/b.tar'])
    assert go('voc-lt', tmp_path, voc, offline=True).images == {'train': 5, 'test': 3}
    assert not web.requests


# ---- what cannot be

@pytest.mark.parametrize('name, why', [
    ('lvis', "'lvis', available: voc-lt, coco-lt"), ('shapes-lt', 'nothing to prepare')])
def test_other_names_are_refused(tmp_path, name, why): assert why in failure(name, tmp_path, None)


@pytest.mark.parametrize('name, kw', [
    ('../x', {}), ('/x', {}), ('', {}), ('..', {}), ('a\\b', {}), ('x\0', {}),
    ('x', dict(lists={'../evil_labels.txt': '0'})), ('x', dict(lists={'a/b': '0'})),
    ('x', dict(archives=(Archive('http://127.0.0.1:9/..', '0', ''),))),
    ('x', dict(archives=(Archive('http://127.0.0.1:9/', '0', ''),))),
])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name, kw):
    source = Source('http://127.0.0.1:9', **(dict(lists={}) | kw))
    text = failure(name, tmp_path/'data', {name: source}, offline=True)
    assert 'leads out of its folder, expected a plain name' in text
    assert not list(tmp_path.iterdir())


def test_a_folder_is_prepared_by_one_process(coco, tmp_path):
    (tmp_path/'coco-lt').mkdir()
    with FileLock(tmp_path/'coco-lt/.lock'):
        assert 'another process prepares' in failure('coco-lt', tmp_path, coco)


def test_a_benchmark_is_prepared_on_a_disk_without_locks(coco, tmp_path, monkeypatch):
    def refuse(lock, **kw): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(FileLock, 'acquire', refuse)
    with pytest.warns(UserWarning, match='is on a disk that cannot lock files'): go('coco-lt', tmp_path, coco)


def test_names_with_odd_characters_are_asked_for_as_such(web, coco, tmp_path):
    path = 'train2017/a#b?c%20.jpg'
    coco['coco-lt'].lists.update(serve_lists(web, {'coco_lt_train.txt': f'{path} 0'.encode()}))
    web.files['/train2017/a%23b%3Fc%2520.jpg'] = jpeg(1)
    assert go('coco-lt', tmp_path, coco).images['train'] == 1


@pytest.mark.parametrize('kw', [dict(workers=0), dict(retries=0), dict(wait=-1)])
def test_numbers_out_of_range_are_refused(coco, tmp_path, kw):
    with pytest.raises(ValueError, match=f'{next(iter(kw))}.*expected'):
        prepare_benchmark('coco-lt', tmp_path, sources=coco, **kw)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path/'file').write_text('in the way')
    (tmp_path/'lists').mkdir()
    (tmp_path/'lists/x_labels.txt').write_bytes(b'a 0')
    source = Source('http://127.0.0.1:9', {'x_labels.txt': sha(b'a 0')})
    text = failure('x', tmp_path/'file', {'x': source}, lists=tmp_path/'lists', offline=True)
    assert 'cannot write below' in text


# ---- the lists of the paper

@pytest.mark.parametrize('name', SOURCES)
def test_checksums_are_those_of_the_benchmark_lists(lists, name):
    assert {file: digest(lists/file) for file in SOURCES[name].lists} == SOURCES[name].lists


@pytest.mark.parametrize('name, parts', [
    ('coco-lt', ['https://s3.amazonaws.com/images.cocodataset.org/train2017/0000', 'more; all 6,909 are in']),
    ('voc-lt', ['VOCtrainval_11-May-2012.tar', 'b6e924de25625d8de591ea690078ad9f'])])
def test_the_official_addresses_are_named(lists, tmp_path, name, parts):
    text = failure(name, tmp_path, SOURCES, lists=lists, offline=True)
    for part in parts: assert part in text
