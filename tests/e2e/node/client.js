// Speaks to the service from the .proto files alone, as a producer and a reader in another language would.
//
// stdin takes one JSON object, stdout gives one:
//
//   in   {"address", "includes": [directories], "ingest": [Event], "producer_id", "batches": [[Event]], "read": [user ids]}
//   out  {"ingested": IngestEventsResponse, "held": sequence, "acks": [StreamEventsResponse], "profiles": [Profile]}
//
// Events are as proto-loader has them: an attribute is {"stringValue": …} or {"numberValue": …}.
"use strict";

const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const DEADLINE_MS = 30_000;

async function main() {
  const task = JSON.parse(await readAll(process.stdin));
  const packages = grpc.loadPackageDefinition(
    protoLoader.loadSync(["userprofile/v1/event_service.proto", "userprofile/v1/profile_service.proto"], {
      includeDirs: task.includes,
      longs: Number,
      defaults: true,
      oneofs: true,
    }),
  );
  const { EventService, ProfileService } = packages.userprofile.v1;
  const credentials = grpc.credentials.createInsecure();
  const events = new EventService(task.address, credentials);
  const profiles = new ProfileService(task.address, credentials);

  const ingested = await unary(events, "IngestEvents", { events: task.ingest });
  const { held, acks } = await produce(events, task.producer_id, task.batches);
  const read = [];
  for (const userId of task.read) {
    read.push(await unary(profiles, "GetProfile", { userId }));
  }
  events.close();
  profiles.close();
  process.stdout.write(JSON.stringify({ ingested, held, acks, profiles: read }) + "\n");
}

function unary(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, { deadline: Date.now() + DEADLINE_MS }, (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

/** Names the producer, sends its batches after the answer, and ends the stream when the last one is acknowledged. */
function produce(client, producerId, batches) {
  return new Promise((resolve, reject) => {
    const stream = client.StreamEvents({ deadline: Date.now() + DEADLINE_MS });
    const acks = [];
    let held;
    stream.on("data", (response) => {
      if (held === undefined) {
        held = response.sequence;
        batches.forEach((batch, i) => stream.write({ events: batch, sequence: held + 1 + i }));
        return;
      }
      acks.push(response);
      if (response.sequence === held + batches.length) {
        stream.end();
      }
    });
    stream.on("error", reject);
    stream.on("end", () => resolve({ held, acks }));
    stream.write({ producerId });
  });
}

async function readAll(stream) {
  let text = "";
  for await (const chunk of stream.setEncoding("utf8")) {
    text += chunk;
  }
  return text;
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
