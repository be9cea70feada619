// Completions as server-sent events.

/** The address of a route. A name and a key in the page's own address must not stand in those of requests. */
export const route = (path) => new URL(path, location.origin + location.pathname);

/** What the API said in place of what was asked. */
export class ApiError extends Error {}

/** The chunks of a completion, as they come. body: of the request, without `stream`. */
export async function* completion(body, signal) {
  const response = await fetch(route("v1/completions"), {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw new ApiError(await reasonOf(response));
  let rest = "";
  for await (const piece of texts(response.body)) {
    const events = (rest + piece).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message);
      yield chunk;
    }
  }
  throw new ApiError("the server ended the stream early");
}

async function* texts(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** Why a response is none. */
export async function reasonOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `the server answered ${response.status} ${response.statusText}`.trim();
  }
}
