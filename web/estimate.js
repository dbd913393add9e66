// What another threshold would have done with the calls of a recorded run, and how fast that would have been.
//
// decide() is the rule of cache/first_block.py on recorded changes. At the threshold of the run it gives the run's own
// decisions. At another one, other calls are reused, and so a call is further from the last computed one than in the
// recording, or nearer: its change grows with a power of that distance. In recorded runs the power lies between 1 and 2
// (bench/estimates.py); with `accumulate` the distance is in the change already.

const POWERS = [1, 2];
const SPARE = 1; // calls by which recorded runs lay outside of that

/** Which calls would have been reused at `threshold`: an array of booleans, one a call. */
export function decide(run, threshold, power) {
  const hits = new Map(); // conditioning -> reused calls since its last computed one
  const recorded = new Map(); // the same in the recording
  const offsets = new Map(); // conditioning -> how far the summed change is from the recorded one
  const of = (map, call) => Math.max(...call.parts.map((part) => map.get(part) ?? 0));
  return run.calls.map((call) => {
    let change = call.change;
    if (change !== null && run.accumulate) change += of(offsets, call);
    else if (change !== null) change *= ((1 + of(hits, call)) / (1 + of(recorded, call))) ** power;
    const reused =
      change !== null && change < threshold && call.admitted && (run.limit < 0 || of(hits, call) < run.limit);
    for (const part of call.parts) {
      hits.set(part, reused ? (hits.get(part) ?? 0) + 1 : 0);
      recorded.set(part, call.reused ? (recorded.get(part) ?? 0) + 1 : 0);
      // The sum starts again after a computed call: in the estimate at other calls than in the recording.
      offsets.set(part, (reused ? change : 0) - (call.reused ? call.change : 0));
    }
    return reused;
  });
}

/** How fast a run would be, against none reused, with so many calls reused; null while a time is not known. */
export function speedupOf(run, reused) {
  const { computed_ms: computed, reused_ms: each, calls } = run;
  if (!reused) return 1;
  if (!computed || !each) return null;
  return Math.max((calls.length * computed) / ((calls.length - reused) * computed + reused * each), 1);
}

/** The threshold of a run's calls; where it changed from call to call (reuse_share), the middle one, as the slider has it. */
export function thresholdOf(run) {
  const all = run.calls.map((call) => call.threshold);
  return run.share ? Number(all.sort((a, b) => a - b)[all.length >> 1].toFixed(3)) : all[0];
}

/** A run as it was: as estimate() gives a threshold tried on it. */
export function recorded(run) {
  return { decisions: run.calls.map((call) => call.reused), reused: [run.reused], speedup: [run.speedup] };
}

/** A threshold tried on a run: `decisions` to draw, and from the least to the most `reused` and `speedup`. */
export function estimate(run, threshold) {
  const middle = decide(run, threshold, (POWERS[0] + POWERS[1]) / 2);
  if (threshold === thresholdOf(run) && !run.share) return { decisions: middle, reused: [run.reused], speedup: [run.speedup] };
  const count = (decisions) => decisions.filter(Boolean).length;
  const counts = POWERS.map((power) => count(decide(run, threshold, power)));
  const possible = run.calls.filter((call) => call.change !== null && call.admitted).length;
  const least = Math.max(Math.min(...counts) - SPARE, 0);
  const most = threshold > 0 ? Math.min(Math.max(...counts) + SPARE, possible) : 0;
  const reused = [Math.min(least, most), most];
  return { decisions: middle, reused, speedup: reused.map((each) => speedupOf(run, each)) };
}
