#include "block/protocols/file_options.h"

namespace gantry::block {

Result<FileOptions> FileOptions::parse(std::string_view driver, const schema::Options& options,
                                       const NodeFlags& flags) {
    FileOptions out;
    out.filename = options.str("filename");
    if (out.filename.starts_with(driver) && out.filename.size() > driver.size() && out.filename[driver.size()] == ':') {
        out.filename.erase(0, driver.size() + 1);
    }
    if (out.filename.empty()) {
        return fail(ErrorKind::kInvalid, "The '{}' block driver requires a file name", driver);
    }
    if (out.filename.find('\0') != std::string::npos) {
        return fail(ErrorKind::kInvalid, "Parameter 'filename' contains a zero byte, which no file name has");
    }

    const std::string locking = options.str("locking", "auto");
    out.locking = locking == "on" ? Locking::kOn : locking == "off" ? Locking::kOff : Locking::kAuto;
    if (options.str("aio", "threads") == "native" && !flags.cache_direct) {
        return fail(ErrorKind::kInvalid,
                    "aio=native was specified, but it requires cache.direct=on, which was not specified.");
    }
    if (options.integer("aio-max-batch") < 0) {
        return fail(ErrorKind::kInvalid, "Parameter 'aio-max-batch' expects a value of 0 or more");
    }
    if (options.has("pr-manager")) {
        return fail(ErrorKind::kUnsupported,
                    "No persistent reservation manager with id '{}'; this build has no persistent reservations",
                    options.str("pr-manager"));
    }
    if (options.flag("x-check-cache-dropped")) {
        return fail(ErrorKind::kUnsupported, "x-check-cache-dropped is a debugging aid that this build does not have");
    }
    return out;
}

}  // namespace gantry::block
