// Reads server-sent events from a response. EventSource cannot: it sends no API key.

/** Gives {name, data} for each event of a stream of bytes. Comments are skipped. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = fieldOf(block, "data");
      if (data !== undefined) yield { name: fieldOf(block, "event") ?? "message", data };
    }
  }
}

function fieldOf(block, name) {
  const line = block.split("\n").find((one) => one.startsWith(`${name}:`));
  return line?.slice(name.length + 1).trimStart();
}
