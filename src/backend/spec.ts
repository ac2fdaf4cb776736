/** The storages that a name can stand for: memory and raw image files. */

import { checkOptions, rangeError, typeError } from "../errors.js";
import { FileStorage } from "./file-storage.js";
import { type BlockStorage, RamStorage } from "./storage.js";

/** A storage described by plain data, as it travels to a child process. */
export type StorageSpec =
  | {
      /** A disk in memory. */
      readonly kind: "ram";
      /** Bytes, a multiple of 512. */
      readonly size: number;
    }
  | {
      /** A raw image file or a block device. */
      readonly kind: "file";
      /** Where it is. */
      readonly path: string;
      /** Open it for reading only. Default false. */
      readonly readOnly?: boolean;
    };

/**
 * Make the storage that `spec` describes.
 *
 * @throws TypeError or RangeError for a wrong description; what {@link RamStorage} and {@link FileStorage} throw.
 * @example
 * ```ts
 * import { openStorage } from "virtio-driver/backend";
 * const disk = openStorage({ kind: "ram", size: 1024 * 1024 });
 * console.log(disk.capacity); // 1048576
 * await disk.close?.();
 * ```
 */
export function openStorage(spec: StorageSpec): BlockStorage {
  if (typeof spec !== "object" || spec === null) throw typeError("spec", "an object", spec);
  const { kind } = spec;
  switch (kind) {
    case "ram":
      checkOptions("spec", spec, ["kind", "size"]);
      return new RamStorage(spec.size);
    case "file":
      checkOptions("spec", spec, ["kind", "path", "readOnly"]);
      return FileStorage.open(spec.path, { readOnly: spec.readOnly ?? false });
    default:
      throw rangeError("spec.kind", `"ram" or "file"`, kind);
  }
}
