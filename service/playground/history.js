// The images made before, kept in this browser (IndexedDB) until they are cleared. Knows nothing of the document.

export const LENGTH = 24;
const NAME = "fewstep";
const STORE = "images";

/** What was kept, newest first; nothing where the browser keeps nothing. */
export async function load() {
  try {
    return (await ask("readonly", (store) => store.getAll())).reverse();
  } catch {
    return [];
  }
}

/** Keeps the images of one answer, while the oldest of all go. A browser that keeps nothing is no error. */
export async function keep(entries) {
  try {
    const keys = await ask("readwrite", (store) => {
      // Backwards, as what was added last counts as newest.
      for (const entry of [...entries].reverse()) store.add(entry);
      return store.getAllKeys();
    });
    await ask("readwrite", (store) => {
      for (const key of keys.slice(0, -LENGTH)) store.delete(key);
    });
  } catch {
    // They are on the page all the same.
  }
}

export async function clear() {
  await ask("readwrite", (store) => store.clear()).catch(() => {});
}

/** The result of the request that `action` makes of the store, once all is written. */
async function ask(mode, action) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const request = action(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
