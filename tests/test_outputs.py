"Tables of notebooks are kept as Markdown"
import pandas as pd
from outputs import markdown_table


def table(*rows, **kw): return markdown_table(pd.DataFrame(*rows, **kw).to_html()).splitlines()


def test_numbers_are_on_the_right():
    assert table(dict(a=['x', 'y'], n=[1.5, -2.]))[1] == '| --: | :-- | --: |'


def test_a_mean_stays_on_one_line():
    assert table(dict(mAP=['1.0 ± 0.1']))[2] == '| 0 | 1.0\u00a0±\u00a00.1 |'


def test_the_name_of_the_index_is_in_the_heading():
    assert table(dict(n=[1]), index=pd.Index(['a'], name='key'))[0] == '| key | n |'


def test_a_cell_over_several_rows_is_written_once():
    index = pd.MultiIndex.from_tuples([('a', 'u'), ('a', 'v'), ('b', 'u')])
    assert table(dict(n=[1, 2, 3]), index=index)[2:] == ['| a | u | 1 |', '|  | v | 2 |', '| b | u | 3 |']


def test_names_from_outside_are_shown_as_written():
    assert table(dict(a=['<b>*x*|y']))[2] == r'| 0 | \<b\>\*x\*\|y |'
