// What the panel knows of the server: its status, then its messages. No page elements here.

const KEPT_RUNS = 50; // as in live.py

/** Follows the server. `changed` is told after each change; `connection` is loading, ready, reconnecting or error. */
export class Store {
  constructor(readStatus) {
    this.readStatus = readStatus; // () => Promise of GET /skein/status
    this.connection = "loading";
    this.error = "";
    this.version = 0;
    this.behind = 0; // seconds that this machine's clock is behind the server's
    this.sampling = { running: false, techniques: [], notes: {}, calls: 0, error: null, activity: null };
    this.processes = [];
    this.runs = [];
    this.sparse = []; // runs under sparse attention
    this.listeners = new Set();
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

  /** The server's clock, in seconds since the epoch. */
  get now() {
    return Date.now() / 1000 + this.behind;
  }

  /** Read everything anew: at the start and after a lost connection. */
  refresh() {
    this.reading ??= this.read().finally(() => (this.reading = null));
    return this.reading;
  }

  async read() {
    try {
      this.take(await this.readStatus(), true);
      Object.assign(this, { connection: "ready", error: "" });
    } catch (error) {
      Object.assign(this, { connection: "error", error: error.message });
    }
    this.changed();
  }

  lost() {
    this.connection = "reconnecting";
    this.changed();
  }

  /** A message of the server. What is not one of its is left alone. */
  receive(message) {
    const { version, runs, sparse } = message ?? {};
    if (!Number.isSafeInteger(version) || !Array.isArray(runs) || !Array.isArray(sparse)) return;
    this.take(message, false);
    this.changed();
  }

  /** The state in a message, or all of it, in a status. Messages may have come while a status was read: what is older
   * than what is known is left out. */
  take({ version, time, sampling, processes, ...told }, whole) {
    for (const kind of ["runs", "sparse"]) {
      const runs = new Map(this[kind].filter((run) => !whole || run.version > version).map((run) => [run.id, run]));
      for (const run of told[kind]) {
        if (!(runs.get(run.id)?.version > run.version)) runs.set(run.id, run);
      }
      this[kind] = [...runs.values()].sort((one, other) => one.started - other.started).slice(-KEPT_RUNS);
    }
    if (version < this.version) return;
    Object.assign(this, { version, sampling, processes, behind: time - Date.now() / 1000 });
  }
}
