"""Scripts that are run before there is a user's: in the warm-up of a snapshot, and in the training of an image.

Guest code: text only.
"""

# What scripts do first, so that its classes are loaded, its code compiled and its modules imported. Each leaves nothing behind.
# `turn` is another number each time: a formula that has been compiled once is not compiled again.
WARM_UP = {
    "update, where, agg_by, join, sort": """
from deephaven import agg, empty_table
from deephaven import new_table
from deephaven.column import double_col, int_col, long_col, string_col
for n in 1, 1000, 1_000_000:
    t = empty_table(n).update('x = i')
    assert t.size == n
t = empty_table(1000).update(['g = ii % 7', 's = `s` + g', f'v = i * {turn}.5', 'ts = now()'])
assert t.where([f'g > {turn % 3}', 's != `s5`']).size > 0
assert t.update(f'w = sqrt(v) + {turn}').size == t.update_view([f'u = g == {turn} ? v : 0.0', 'r = s.length()']).size
assert t.agg_by([agg.sum_('sv = v'), agg.avg('av = v'), agg.count_('n')], by=['g']).size == 7
assert t.view(['g', 'v']).sum_by('g').size == t.last_by('g').size
right = new_table([long_col('g', [0, 1]), string_col('name', ['a', 'b']), int_col('n', [1, 2]), double_col('d', [1.0, 2.0])])
assert t.natural_join(right, on='g', joins='name').sort('v').sort_descending('g').size == 1000
assert t.join(right, on='g').select(['g', 'name']).head(5).size == 5
print(t.size)
""",
    "parquet": """
import os
from deephaven import empty_table, parquet
t = empty_table(1000).update(['x = i', 's = `a` + i', f'd = i / 3.{turn}'])
parquet.write(t, '/tmp/warm.parquet')
assert parquet.read('/tmp/warm.parquet').select().size == 1000
os.unlink('/tmp/warm.parquet')
""",
    "ticking table": """
import time
from deephaven import time_table
from deephaven.execution_context import get_exec_ctx
t = time_table('PT0.02s').update('y = ii * 2')
n = t.last_by()
until = time.monotonic() + 120
while t.size < 3:
    assert time.monotonic() < until, 'the update graph does not run'
    time.sleep(0.05)
    get_exec_ctx().update_graph.j_update_graph.requestRefresh()
n.close() if hasattr(n, 'close') else None
""",
    "csv": """
import os
from deephaven import agg, read_csv, write_csv
from deephaven.pandas import to_pandas
with open('/tmp/warm.csv', 'w') as file:
    file.write('sym,price,qty\\n' + ''.join(f'S{i % 5},{i / 7},{i}\\n' for i in range(2000)))
t = read_csv('/tmp/warm.csv')
assert t.size == 2000
sums = t.agg_by([agg.sum_('qty'), agg.avg('price'), agg.max_('most = price'), agg.count_('n')], by=['sym'])
assert to_pandas(sums).to_string(index=False)
write_csv(t.head(10), '/tmp/warm2.csv')
os.unlink('/tmp/warm.csv')
os.unlink('/tmp/warm2.csv')
""",
    "pandas, numpy": """
import pandas
from deephaven import empty_table
from deephaven.numpy import to_numpy
from deephaven.pandas import to_pandas, to_table
empty = empty_table(0).update('x = i')
frame = to_pandas(empty_table(1000).update(['x = i', 's = `a` + i', 'd = i / 3.0']))
frame.head(10).to_string(index=False)
assert to_table(frame).size == 1000
assert frame.groupby('s').d.mean().size == 1000
to_numpy(empty_table(10).update('x = i'))
""",
}

# What most scripts go through, for the rehearsal under emulation: what it runs need not be translated in a clone.
REHEARSAL = """
import os
from deephaven import agg, empty_table, parquet, read_csv
from deephaven.pandas import to_pandas
t = empty_table(1000).update(['x = i', f'v = i * {turn}.75']).where('x > 5')
parquet.write(t, '/tmp/warm.parquet')
assert parquet.read('/tmp/warm.parquet').select().size == t.size
os.unlink('/tmp/warm.parquet')
with open('/tmp/warm.csv', 'w') as file:
    file.write('sym,price,qty\\n' + ''.join(f'S{i % 5},{i / 7},{i}\\n' for i in range(2000)))
t = read_csv('/tmp/warm.csv').agg_by([agg.sum_('qty'), agg.avg('price')], by=['sym'])
print(to_pandas(t).to_string(index=False))
os.unlink('/tmp/warm.csv')
"""

# And what the warm-up does not run, for the rehearsal, too: what a query of a new kind goes through, whatever it is (classes are
# loaded, methods compiled).
REHEARSAL_NEW = """
from deephaven import empty_table, updateby as uby
t = empty_table(1000).update(['g = i % 5', 'v = i * 1.5'])
assert t.update_by(uby.cum_sum('s = v'), by='g').head_by(2, by='g').size == 10
assert t.reverse().move_columns_up('v').count_by('n').size == 1
t = empty_table(50_000).update(['x = ii', 'y = x % 10']).where('y > 5')
assert t.select().sum_by('y').size == 4
assert t.sort_descending('x').head(3).size == 3
"""

# What all rows of a formula go through, whatever the formula: `times` tables of `rows` rows each. And what rows go through that are
# left of others: in a set of rows with gaps each is looked for (BitmapContainer.select).
ROWS = """
from deephaven import empty_table
for n in range(times):
    for formula in 'x = i', 'x = i + 7', 'x = ii * 2', 'x = i * 0.5':
        t = empty_table(rows).update(formula)
    t = empty_table(rows).update(['x = i', 'y = x % 10']).where('y > 5')
    assert t.select().size == t.update('z = x * 0.5').size
"""

# And what rows and cells go through in other operations: natively this takes seconds, under emulation it would take minutes.
CELLS = """
import os
from deephaven import agg, empty_table, new_table, parquet, read_csv, write_csv
from deephaven.column import int_col, string_col
from deephaven.numpy import to_numpy
from deephaven.pandas import to_pandas, to_table
few = new_table([string_col('sym', [f'S{n}' for n in range(5)]), int_col('key', list(range(5)))])
for n in range(times):
    with open('/tmp/warm.csv', 'w') as file:
        file.write('sym,price,qty,up\\n' + ''.join(f'S{i % 5},{i / 7},{i},{i % 2 == 0}\\n' for i in range(rows)))
    t = read_csv('/tmp/warm.csv')
    os.unlink('/tmp/warm.csv')
    sums = [agg.sum_('s = price'), agg.avg('a = price'), agg.min_('l = qty'), agg.max_('m = price'), agg.count_('n')]
    assert t.agg_by(sums, by=['sym']).size == t.update('g = qty % 5').agg_by(sums, by=['g']).size == 5
    assert t.natural_join(few, 'sym').join(few.view('sym'), 'sym').size == rows
    assert t.where(['sym = `S1`', 'price > 10.5']).sort(['sym', 'price']).sort_descending('qty').size
    assert t.update(['v = sqrt(price) + qty', 'w = sym + qty', 'u = qty > 5 ? price : 0.0']).last_by('sym').size == 5
    write_csv(t.head(rows // 10), '/tmp/warm.csv')
    os.unlink('/tmp/warm.csv')
    parquet.write(t, '/tmp/warm.parquet')
    assert parquet.read('/tmp/warm.parquet').select().size == rows
    os.unlink('/tmp/warm.parquet')
    assert to_table(to_pandas(t)).size == len(to_numpy(t.view('price'))) == rows
"""

# What a formula itself goes through: it is parsed, compiled, loaded. Natively, too.
FORMULAS = """
from deephaven import empty_table
t = empty_table(100).update(['g = i % 7', 's = `k` + g', f'v = i * {turn}.5', 'up = g > 3', 'ts = now()'])
for n in range(10):
    a = turn * 20 + n
    t.update(f'x = i * {a} + {a}.25').view(f'y = x > {a} ? v : 0.0')
    t.where([f'v > {a}.25', f's != `{a}`']).update_view(f'y = sqrt(v) + {a}')
    t.lazy_update(f'y = s.length() + {a}').select(['y', f'z = y * {a}'])
    t.update([f'y = up && g > {a} % 5', f'w = abs(v) + max(v, {a}.0)', f'q = (int) v % {a + 1}'])
    t.update([f'y = epochMillis(ts) + {a}', f'z = s + `_{a}`'])
"""

# What other scripts may do. Run once, natively, when the image is made, for the archive of classes (training.py). Each line stands
# for itself: what this release of Deephaven does not have is left out. So many rows that sets of rows take all their forms.
TRAINING = """
from deephaven import agg, empty_table, merge, new_table, ring_table, time_table, updateby as uby
from deephaven.column import bool_col, byte_col, datetime_col, double_col, float_col, int_col, long_col, short_col, string_col
t = empty_table(100_000).update(['g = i % 7', 'h = `k` + (i % 5)', 'x = ii', 'v = i * 0.5', 'f = (float) v', 'b = i % 2 == 0'])
t = t.update(['ts = (Instant) (parseInstant(`2024-01-01T00:00:00Z`) + i * SECOND)'])
other = new_table([int_col('key', [0, 1, 2]), string_col('name', ['a', 'b', 'c']), double_col('w', [1.0, 2.0, 3.0])])
new_table([bool_col('a', [True]), byte_col('b', [1]), short_col('c', [1]), int_col('d', [1]), float_col('e', [1.0])]).select()
t.update_view('y = sqrt(v) + sin(v) + cos(v) + tan(v) + log(v + 1) + exp(-v) + pow(v, 2) + abs(v) + floor(v) + ceil(v) + round(v)')
t.update('y = sqrt(v) + sin(v) + log(v + 1) + pow(v, 2) + abs(v) + max(v, f) + min(v, f)')
t.lazy_update('y = g * 2').select()
t.update(['y = b ? v : f', 'z = isNull(v) ? 0.0 : v', 's = h.toUpperCase().substring(0, 1)', 'q = (int) v', 'l = h.length()'])
t.update(['y = x_[i - 1]', 'z = Math.floorMod(x, 3)', 'w = h.contains(`1`)'])
t.update(['d = toLocalDate(ts, timeZone(`UTC`))', 'e = epochMillis(ts)', 'n = lowerBin(ts, MINUTE)'])
t.update('z = diffNanos(ts, now())')
t.view(['x', 'y = v + 1']).where('y > 3').drop_columns('x').rename_columns('z = y').select()
t.where(['g > 2', 'h != `k1`', 'v < 100 || b', 'x in 1, 2, 3']).size
t.where('h.startsWith(`k`)').where('!b').where('ts > parseInstant(`2024-01-01T00:00:10Z`)').size
t.where_in(other, 'g = key').size
t.where_not_in(other, 'g = key').size
t.where_one_of(['g = 1', 'g = 2']).size
t.head(5).select()
t.tail(5).select()
t.head_pct(0.1).select()
t.tail_pct(0.1).select()
t.slice(3, 9).select()
t.reverse().head(3).select()
t.sort(['g', 'h']).select()
t.sort_descending('v').select()
t.sort_descending(['g', 'v']).head(3).select()
t.select_distinct(['g', 'h']).size
t.count_by('n', 'g').select()
t.first_by('g').select()
t.last_by('g').select()
t.head_by(2, 'g').select()
t.tail_by(2, 'g').select()
t.group_by('g').ungroup().size
t.group_by(['g', 'h']).update('n = len(v)').select()
t.group_by('g').update(['a = avg(v)', 's = sum(v)', 'm = max(v)']).select()
t.view(['g', 'v', 'f', 'x']).sum_by('g').select()
t.view(['g', 'v', 'f', 'x']).avg_by('g').select()
t.view(['g', 'v', 'f', 'x']).min_by('g').select()
t.view(['g', 'v', 'f', 'x']).max_by('g').select()
t.view(['g', 'v']).std_by('g').select()
t.view(['g', 'v']).var_by('g').select()
t.view(['g', 'v']).median_by('g').select()
t.view(['g', 'v', 'f']).abs_sum_by('g').select()
t.view(['g', 'v', 'x']).weighted_avg_by('x', 'g').select()
t.view(['g', 'v', 'x']).weighted_sum_by('x', 'g').select()
t.agg_by([agg.sum_('a = v'), agg.avg('c = v'), agg.min_('d = v'), agg.max_('e = v'), agg.count_('n')], 'g').select()
t.agg_by([agg.first('a = v'), agg.last('c = v'), agg.median('d = v'), agg.var('e = v'), agg.unique('u = b')], ['g', 'h']).select()
t.agg_by([agg.count_distinct('a = h'), agg.distinct('c = h'), agg.group('d = v'), agg.pct(0.9, 'e = v')], 'g').select()
t.agg_by([agg.sorted_first('x', 'a = v'), agg.sorted_last('x', 'c = v'), agg.std('d = v')], 'g').select()
t.agg_by([agg.partition('p')], 'g').select()
t.agg_by([agg.formula('avg(each)', 'each', ['a = v'])], 'g').select()
t.agg_all_by(agg.first(), 'g').select()
t.agg_by([agg.count_('n')]).select()
t.agg_by([agg.sum_(['v', 'x', 'f'])]).select()
t.partition_by('g').merge().select()
t.partition_by(['g', 'h']).table.size
from deephaven.execution_context import get_exec_ctx
with get_exec_ctx():
    t.partition_by('g').transform(lambda one: one.update('y = v + 1')).merge().size
t.partition_by('g').proxy().update('y = v * 2').target.merge().size
t.partitioned_agg_by(agg.sum_('v'), by='g').merge().size
merge([t, t]).size
t.natural_join(other, 'g = key').select()
t.exact_join(t.select_distinct('g').update('u = g * 2'), 'g').select()
t.join(other, 'g = key').size
t.aj(t.view(['ts', 'r = v']), 'ts').select()
t.raj(t.view(['ts', 'r = v']), 'ts').select()
from deephaven.experimental.outer_joins import full_outer_join, left_outer_join
left_outer_join(t, other, 'g = key').size
full_outer_join(t, other, 'g = key').size
t.update_by([uby.cum_sum('a = v'), uby.cum_max('c = v'), uby.cum_min('d = v'), uby.cum_prod('e = v')], 'g').select()
t.update_by([uby.ema_tick(3, 'a = v'), uby.ems_tick(3, 'c = v'), uby.forward_fill('d = v'), uby.delta('e = v')], 'g').select()
t.update_by([uby.ema_time('ts', 'PT5s', 'a = v')], 'g').select()
t.update_by([uby.rolling_sum_tick('a = v', 5), uby.rolling_avg_tick('c = v', 5), uby.rolling_max_tick('d = v', 5)], 'g').select()
t.update_by([uby.rolling_std_tick('a = v', 5), uby.rolling_count_tick('c = v', 5), uby.rolling_group_tick('d = v', 5)]).select()
t.update_by([uby.rolling_sum_time('ts', 'a = v', 'PT10s'), uby.rolling_avg_time('ts', 'c = v', 'PT10s')], 'g').select()
t.rollup([agg.sum_('v')], by=['g', 'h'])
t.view(['x', 'p = x > 0 ? (long) (x / 2) : NULL_LONG']).tree('x', 'p')
t.snapshot().size
t.meta_table.select()
t.flatten().size
t.move_columns_up('v').columns
t.with_attributes({}).size
t.format_columns('v = Decimal(`0.00`)').size
t.update('y = `a` + h + v').where('y.length() > 2').size
from numpy import int64
def twice(n) -> int64:
    return n * 2
t.head(50).update('y = twice(x)').select()
t.head(50).update('y = (long) twice(x)').where('y > 3').size
t.head(50).update('y = java.lang.String.valueOf(x)').select()
t.head(50).update('y = new int[] {i, i + 1}').ungroup('y').size
t.head(5).update(['d = `2024-01-01`', 'e = parseLocalDate(d)', 'p = parseDuration(`PT1s`)']).select()
from deephaven import arrow, numpy as dhnp, pandas as dhpd
arrow.to_table(arrow.to_arrow(t.head(20))).size
dhnp.to_numpy(t.view(['x'])).shape
dhnp.to_table(dhnp.to_numpy(t.view(['v'])), ['v']).size
dhpd.to_table(dhpd.to_pandas(t.head(20))).size
dhpd.to_pandas(t.view(['g', 'v', 'ts', 'b', 'h'])).describe()
from deephaven import parquet, read_csv, write_csv
parquet.write(t.drop_columns('b'), '/tmp/t.parquet')
parquet.read('/tmp/t.parquet').where('g = 2').agg_by(agg.sum_('v'), 'h').select()
write_csv(t.head(100), '/tmp/t.csv')
read_csv('/tmp/t.csv').select()
read_csv('/tmp/t.csv').agg_by([agg.avg('v'), agg.sum_('x')], by=['h']).select()
from deephaven import dtypes as dht
from deephaven import input_table
it = input_table(col_defs={'a': dht.string, 'b': dht.int32}, key_cols='a')
it.add(new_table([string_col('a', ['x']), int_col('b', [1])]))
from deephaven.stream.table_publisher import table_publisher
from deephaven.stream import blink_to_append_only
blink, publisher = table_publisher('p', {'a': dht.int64})
publisher.add(new_table([long_col('a', [1, 2])]))
blink_to_append_only(blink).size
from deephaven.table_listener import listen
tick = time_table('PT0.01s').update(['y = ii % 3', 'z = y * 2.5'])
last, sums = tick.last_by('y'), tick.agg_by([agg.sum_('z'), agg.count_('n')], 'y')
heard = []
handle = listen(tick, lambda update, is_replay: heard.append(update.added()))
joined, ordered, moving = tick.natural_join(last, 'y', 'w = z'), tick.sort_descending('z'), tick.update_by(uby.cum_sum('z'))
ring, some, windowed = ring_table(tick, 5), tick.where('y > 0'), tick.tail(10)
import time; time.sleep(1.0)
handle.stop()
snapped = tick.snapshot_when(time_table('PT0.05s').rename_columns('at = Timestamp'))
time.sleep(0.3)
tick.snapshot().size
from deephaven import DHError
t.update('y = no_such_column')
t.where('g >')
from deephaven.liveness_scope import liveness_scope
from deephaven.update_graph import exclusive_lock
from deephaven.query_library import import_class
from deephaven.time import to_j_instant, dh_now
to_j_instant('2024-01-01T00:00:00Z')
from deephaven.calendar import calendar
from deephaven.filters import Filter, and_, or_
from deephaven.replay import TableReplayer
from deephaven.plot.figure import Figure
Figure().plot_xy(series_name='s', t=t, x='x', y='v').show()
from deephaven import json
from deephaven.experimental import sql
sql.evaluate('SELECT g, SUM(v) AS s FROM t GROUP BY g').size
"""
