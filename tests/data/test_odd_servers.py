"What `fetch` makes of servers that err or do harm; every refusal is a sentence that names the address"
import gzip
import re
import socket
import threading
import time

import pytest
import requests

from cprfl.data.download import SOURCES, Limits, PrepareError, fetch

OK = b'HTTP/1.1 200 OK\r\nConnection: close\r\n'
SMALL = Limits(size=1 << 20, seconds=5, rate=1, silence=.3)


class OddServer:
    "Answers each path with fixed bytes, or lets a function write what it likes to the socket"
    def __init__(self):
        self.answers, self.requests = {}, []
        self.socket = socket.create_server(('127.0.0.1', 0))
        self.url = f'http://127.0.0.1:{self.socket.getsockname()[1]}'
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try: connection, _ = self.socket.accept()
            except OSError: return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection:
            request = connection.recv(65536).decode()
            if not request: return
            self.requests.append(request)
            answer = self.answers[request.split()[1]]
            try: answer(connection) if callable(answer) else connection.sendall(answer)
            except OSError: pass # it was given up


@pytest.fixture
def odd(monkeypatch):
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    server = OddServer()
    yield server
    server.socket.close()


@pytest.fixture
def session():
    with requests.Session() as session: yield session


@pytest.fixture
def get(odd, session, tmp_path):
    "Download what the server answers at /x"
    def get(answer, check=None, limits=SMALL, retries=2):
        odd.answers['/x'] = answer
        fetch(session, f'{odd.url}/x', tmp_path/'x', check, retries=retries, wait=0, limits=limits)
        return (tmp_path/'x').read_bytes()
    return get


@pytest.fixture
def refusal(get, odd, tmp_path):
    "The sentence in which an answer is refused; nothing may get the file's name"
    def refusal(answer, **kw):
        with pytest.raises(PrepareError) as e: get(answer, **kw)
        text = str(e.value)
        assert text.startswith(f'{odd.url}/x could not be had: ')
        assert len(text.splitlines()) == 1
        assert not (tmp_path/'x').exists()
        return text
    return refusal


def trickle(head, byte=b'x', pause=.05):
    "Send a head, and then a byte now and then, without an end"
    def send(connection):
        connection.sendall(head)
        while True:
            connection.sendall(byte)
            time.sleep(pause)
    return send


def endless(connection):
    connection.sendall(OK + b'\r\n')
    while True: connection.sendall(bytes(1 << 16))


def redirect(target): return b'HTTP/1.1 302 Found\r\nConnection: close\r\nLocation: ' + target + b'\r\n\r\n'


# ---- lengths

@pytest.mark.parametrize('length', [b'abc', b'-5', b'1e3', b'0x10', b'5, 6', b'9' * 30, '٣'.encode()])
def test_a_length_that_is_no_number_is_refused(odd, refusal, length):
    refusal(OK + b'Content-Length: ' + length + b'\r\n\r\nxxxxx')
    assert len(odd.requests) == 2 # it may be gone at the next attempt


def test_a_file_shorter_than_announced_is_refused(refusal):
    refusal(OK + b'Content-Length: 10\r\n\r\nxxxxx')


def test_a_file_without_a_length_is_taken(get):
    assert get(OK + b'\r\nxxxxx') == b'xxxxx'


def test_chunks_are_put_together(get):
    assert get(OK + b'Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n') == b'abcde'


@pytest.mark.parametrize('chunks', [b'zz\r\nabc', b'-3\r\nabc\r\n', b'5\r\nab', b''])
def test_broken_chunks_are_refused(refusal, chunks):
    refusal(OK + b'Transfer-Encoding: chunked\r\n\r\n' + chunks)


def test_more_than_the_limit_is_refused_before_it_comes(odd, refusal):
    text = refusal(OK + b'Content-Length: 1048577\r\n\r\nxxxxx')
    assert 'announces 1,048,577 bytes, expected at most 1,048,576' in text
    assert len(odd.requests) == 1


def test_a_file_without_an_end_is_cut_at_the_limit(refusal, tmp_path):
    sizes = []
    text = refusal(endless, check=lambda file: sizes.append(file.stat().st_size))
    assert 'more than 1,048,576 bytes' in text
    assert not sizes
    assert not list(tmp_path.iterdir())


# ---- time

def test_a_server_that_says_nothing_is_given_up(refusal):
    refusal(lambda connection: time.sleep(5), retries=1)


@pytest.mark.parametrize('head, again', [(OK + b'X: ', b'x'), (b'', b'HTTP/1.1 100 Continue\r\n\r\n')])
def test_a_head_without_an_end_is_given_up(refusal, head, again):
    assert 'did not answer in time' in refusal(trickle(head, again), retries=1)


def test_a_server_that_stops_is_given_up(refusal):
    def stops(connection):
        connection.sendall(OK + b'Content-Length: 10\r\n\r\nxxxxx')
        time.sleep(5)
    assert 'stopped sending' in refusal(stops, retries=1)


def test_a_slow_server_is_given_up(refusal):
    limits = Limits(rate=1e6, silence=.2)
    assert 'bytes came in a second, expected at least' in refusal(trickle(OK + b'\r\n'), limits=limits, retries=1)


def test_a_download_has_a_deadline(refusal):
    limits = Limits(seconds=.2, rate=0, silence=5)
    assert 'was not complete after' in refusal(trickle(OK + b'\r\n'), limits=limits, retries=1)


# ---- redirects

def test_a_redirect_is_followed(odd, get):
    odd.answers['/y'] = OK + b'Content-Length: 2\r\n\r\nhi'
    assert get(redirect(b'/y')) == b'hi'


@pytest.mark.parametrize('target', [
    b'file:///etc/hostname', b'ftp://127.0.0.1/x', b'data:,x', b'http://[', b'http://\xff', b'http://', b'//:x/'])
def test_a_redirect_out_of_the_web_is_refused(refusal, target): refusal(redirect(target))


def test_a_redirect_to_itself_is_refused(odd, refusal):
    assert 'from address to address' in refusal(redirect(b'/x'))
    assert len(odd.requests) < 10


class Redirecting(requests.adapters.HTTPAdapter):
    "Every answer leads to http"
    def send(self, request, **kw):
        answer = requests.Response()
        answer.status_code, answer.headers['Location'] = 301, 'http://elsewhere/x'
        return answer


def test_a_redirect_from_https_to_http_is_refused(session, tmp_path):
    session.mount('https://', Redirecting())
    with pytest.raises(PrepareError, match='expected an address with https$'):
        fetch(session, 'https://there/x', tmp_path/'x', retries=1)


def test_a_redirect_without_an_end_to_its_body_is_not_read(odd, get):
    def leads_on(connection):
        connection.sendall(redirect(b'/y'))
        while True: connection.sendall(bytes(1 << 16))
    odd.answers['/y'] = OK + b'Content-Length: 2\r\n\r\nhi'
    assert get(leads_on) == b'hi'


# ---- other answers

def test_a_packed_file_is_refused(refusal):
    packed = gzip.compress(b'x' * 1000)
    assert 'gzip' in refusal(OK + b'Content-Encoding: gzip\r\n\r\n' + packed)


def test_a_file_is_asked_for_as_it_is(odd, get):
    get(OK + b'Content-Length: 2\r\n\r\nhi')
    assert 'Accept-Encoding: identity' in odd.requests[0]


def test_a_web_page_in_place_of_a_file_is_named(refusal):
    page = OK + b'Content-Type: text/html; charset=utf-8\r\n\r\n<html>please log in</html>'
    assert 'is broken, the server sent a web page' in refusal(page, check=lambda file: 'image is broken')


@pytest.mark.parametrize('status', ['204 No Content', '203 Other', '300 Several', '304 Same', '404 Gone', '999 What'])
def test_an_answer_that_holds_no_file_is_refused(refusal, status):
    assert status[:3] in refusal(f'HTTP/1.1 {status}\r\nConnection: close\r\n\r\nxxxx'.encode())


@pytest.mark.parametrize('answer', [
    b'', b'\r\n\r\n', b'hello', b'HTTP/1.1 abc\r\n\r\n',
    b'HTTP/1.1 200 OK\r\nX: ' + b'x' * 70_000,
    b'HTTP/1.1 200 OK\r\n' + b'X: y\r\n' * 300 + b'\r\nx',
])
def test_what_is_no_answer_is_refused(refusal, answer): refusal(answer)


def test_words_of_the_server_cannot_steer_the_terminal(refusal):
    assert '\x1b' not in refusal(b'HTTP/1.1 404 \x1b[2Jgone\r\n\r\n')
    assert '\x1b' not in refusal(OK + b'Content-Encoding: \x1b[2J\r\n\r\nx')
    assert '\x1b' not in refusal(OK + b'Content-Length: \x1b[2J\r\n\r\nx')


@pytest.mark.parametrize('status, span', [
    ('206 Partial', 'bytes 5-9/10'), ('206 Partial', ''), ('416 Range', 'bytes */0'), ('416 Range', 'bytes */7')])
def test_a_part_that_nobody_asked_for_is_refused(refusal, status, span):
    head = f'HTTP/1.1 {status}\r\nConnection: close\r\nContent-Range: {span}\r\nContent-Length: 5\r\n\r\n'
    refusal(head.encode() + b'xxxxx')


@pytest.mark.parametrize('span', ['bytes 0-9/10', 'bytes 9-10/10', 'lines 3-9/10', 'bytes 33-/10', ''])
def test_another_part_than_the_missing_one_is_not_appended(odd, get, tmp_path, span):
    (tmp_path/'x.part').write_bytes(b'abc')
    wrong = f'HTTP/1.1 206 Partial\r\nConnection: close\r\nContent-Range: {span}\r\n\r\nxxxxxxx'.encode()
    whole = OK + b'Content-Length: 10\r\n\r\nabcdefghij'

    def answers(connection): connection.sendall(wrong if len(odd.requests) == 1 else whole)

    assert get(answers) == b'abcdefghij'


@pytest.mark.parametrize('status', ['404 Gone', '403 No', '503 Busy', '302 Found'])
def test_an_error_keeps_what_came_before(refusal, tmp_path, status):
    (tmp_path/'x.part').write_bytes(b'abc')
    refusal(f'HTTP/1.1 {status}\r\nConnection: close\r\nLocation: file:///x\r\n\r\n'.encode())
    assert (tmp_path/'x.part').read_bytes() == b'abc'


def test_what_is_too_large_leaves_no_part_behind(get, refusal, tmp_path):
    (tmp_path/'x.part').write_bytes(b'x' * (2 << 20))
    whole = b'HTTP/1.1 206 Partial\r\nConnection: close\r\nContent-Range: bytes 2097152-\r\n\r\nxxxxx'
    assert 'more than' in refusal(whole)
    assert not list(tmp_path.iterdir())


# ---- the hosts

@pytest.mark.parametrize('name', SOURCES)
def test_every_address_is_https(name):
    source = SOURCES[name]
    addresses = [source.lists_url, source.images_url, *(archive.url for archive in source.archives)]
    assert {re.match('[a-z]*:|$', address)[0] for address in addresses} <= {'https:', ''}


@pytest.mark.parametrize('name', SOURCES)
def test_every_list_and_archive_has_a_size(name):
    source = SOURCES[name]
    assert source.sizes.keys() == source.lists.keys()
    assert all(archive.size for archive in source.archives)


@pytest.mark.parametrize('name', SOURCES)
def test_sizes_are_those_of_the_benchmark_lists(lists, name):
    assert {file: (lists/file).stat().st_size for file in SOURCES[name].lists} == SOURCES[name].sizes
