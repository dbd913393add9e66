// What another threshold would have done with the calls of a recorded run, and how fast a run is.
//
// decide() is the rule of cache/first_block.py on recorded changes. At the threshold of the run it gives the run's own
// decisions. At another one it is an estimate: a call reused instead of computed changes what later calls compare with.

/** Which calls would have been reused at `threshold`: an array of booleans, one a call. */
export function decide(run, threshold) {
  const hits = new Map(); // conditioning -> reused calls since its last computed one
  const offsets = new Map(); // conditioning -> how far the summed change is from the recorded one
  return run.calls.map((call) => {
    const offset = Math.max(...call.parts.map((part) => offsets.get(part) ?? 0));
    const change = call.change === null ? null : call.change + (run.accumulate ? offset : 0);
    const reused =
      change !== null &&
      change < threshold &&
      call.admitted &&
      (run.limit < 0 || call.parts.every((part) => (hits.get(part) ?? 0) < run.limit));
    for (const part of call.parts) {
      hits.set(part, reused ? (hits.get(part) ?? 0) + 1 : 0);
      // The sum starts again after a computed call: in the estimate at other calls than in the recording.
      const here = reused && change !== null ? change : 0;
      const recorded = call.reused && call.change !== null ? call.change : 0;
      offsets.set(part, here - recorded);
    }
    return reused;
  });
}

function median(values) {
  return values.sort((a, b) => a - b)[Math.floor(values.length / 2)];
}

function times(calls, reused) {
  return calls.filter((call) => call.ms !== null && call.reused === reused).map((call) => call.ms);
}

/** Time had every call taken what the computed ones took (median), over the time taken; null while unknown. */
export function speedup(calls) {
  const timed = calls.filter((call) => call.ms !== null);
  const total = timed.reduce((sum, call) => sum + call.ms, 0);
  const computed = times(calls, false);
  return computed.length && total > 0 ? (median(computed) * timed.length) / total : null;
}

/** The speedup at the end of a run, if its other calls go on as those of the last third of what has run did. */
export function expectedSpeedup(run) {
  const timed = run.calls.filter((call) => call.ms !== null);
  if (!run.steps || timed.length < 3) return null;
  const all = Math.max(Math.round((timed.length * run.steps) / (timed.at(-1).step + 1)), timed.length);
  const recent = timed.slice(-Math.ceil(timed.length / 3));
  const pace = recent.reduce((sum, call) => sum + call.ms, 0) / recent.length;
  const spent = timed.reduce((sum, call) => sum + call.ms, 0);
  return (median(times(timed, false)) * all) / (spent + pace * (all - timed.length));
}

/** The speedup if the calls had been decided as given; null where no call of a kind that is needed was timed. */
export function speedupOf(calls, decisions) {
  const computed = times(calls, false);
  const reused = times(calls, true);
  const hits = decisions.filter(Boolean).length;
  if (!computed.length || (hits && !reused.length)) return null;
  const each = median(computed);
  const total = (calls.length - hits) * each + (hits ? hits * median(reused) : 0);
  return total > 0 ? (calls.length * each) / total : null;
}
