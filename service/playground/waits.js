// Waiting, for a while or until something is given up.

export function pause(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** What `promise` gives; rejects at once when `signal` is aborted, also where it was before. */
export function unlessAborted(promise, signal) {
  const aborted = new Promise((_, reject) => {
    const giveUp = () => reject(signal.reason);
    if (signal.aborted) giveUp();
    signal.addEventListener("abort", giveUp, { once: true });
  });
  return Promise.race([promise, aborted]);
}
