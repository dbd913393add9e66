// What the panel knows: the server's status, kept up to date by its events. No page elements here.

const KEPT_RUNS = 16;

/** Follows the server. `changed` is told after each change; `connection` is loading, ready, reconnecting or error. */
export class Store {
  constructor(readStatus) {
    this.readStatus = readStatus; // () => Promise of GET /skein/status
    this.connection = "loading";
    this.error = "";
    this.seq = 0;
    this.sampling = { running: false, techniques: [], notes: {}, calls: 0, error: null };
    this.processes = [];
    this.runs = [];
    this.sparse = []; // runs under sparse attention
    this.listeners = new Set();
    this.early = []; // events that came while the status was being read
    this.reading = null;
  }

  /** Call back after each change; returns what ends that. */
  subscribe(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  changed() {
    for (const listener of this.listeners) listener();
  }

  get current() {
    const last = this.runs.at(-1);
    return last && !last.ended ? last : null;
  }

  /** Read everything anew: at the start, after a lost connection, where events are missing. */
  refresh() {
    this.reading ??= this.read().finally(() => (this.reading = null));
    return this.reading;
  }

  async read() {
    try {
      const { seq, sampling, processes, runs, sparse } = await this.readStatus();
      Object.assign(this, { seq, sampling, processes, runs, sparse, connection: "ready", error: "" });
    } catch (error) {
      this.connection = "error";
      this.error = error.message;
    }
    const early = this.early.splice(0);
    this.reading = null;
    if (this.connection === "ready") this.receive({ events: early });
    this.changed();
  }

  lost() {
    this.connection = "reconnecting";
    this.changed();
  }

  /** A message of the server. What is not one of its events is left alone. */
  receive(message) {
    const events = Array.isArray(message?.events) ? message.events.filter((e) => Number.isInteger(e?.seq)) : [];
    if (this.reading) this.early.push(...events);
    if (this.reading || this.connection !== "ready") return; // the status that is read next holds them
    const news = events.filter((event) => event.seq > this.seq);
    for (const event of news) {
      if (event.seq !== this.seq + 1) {
        this.refresh(); // some are missing
        return;
      }
      this.seq = event.seq;
      this.apply(event);
    }
    if (news.length) this.changed();
  }

  apply(event) {
    const run = this.runs.find((each) => each.id === (event.run?.id ?? event.run));
    if (event.kind === "sampling") this.sampling = event.sampling;
    else if (event.kind === "processes") this.processes = event.processes;
    else if (event.kind === "step") Object.assign(this.sampling, { calls: event.calls, step_ms: event.step_ms });
    else if (event.kind === "note") this.sampling.notes[event.about] = event.text;
    else if (event.kind === "sparse") this.applySparse(event.run);
    else if (event.kind === "run" && run) Object.assign(run, event.run);
    else if (event.kind === "run") this.runs = [...this.runs, { ...event.run, calls: [] }].slice(-KEPT_RUNS);
    else if (event.kind === "call" && run) {
      run.steps = event.steps;
      run.calls[event.index] = event.call;
      Object.assign(run, event.sums);
    }
    for (const [index, ms] of (run && event.times) || []) if (run.calls[index]) run.calls[index].ms = ms;
  }

  /** Such a run comes whole, each time. */
  applySparse(run) {
    const known = this.sparse.some((each) => each.id === run.id);
    this.sparse = known
      ? this.sparse.map((each) => (each.id === run.id ? run : each))
      : [...this.sparse, run].slice(-KEPT_RUNS);
  }
}
