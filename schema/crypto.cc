// Encryption of images: formats, ciphers, options of creation and of key slots, what queries tell.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

constexpr EnumValue kBlockFormatValues[] = {
    {"qcow", "AES-CBC of old qcow images; not secure"},
    {"luks", "LUKS version 1"},
};
constexpr EnumValue kQcow2FormatValues[] = {
    {"aes", "AES-CBC of old images; not secure"},
    {"luks", "LUKS version 1"},
};
constexpr std::string_view kNoCipher = "not in this build: this cipher is not built";
constexpr EnumValue kCipherValues[] = {
    {"aes-128", "AES, keys of 128 bits"},         {"aes-192", "AES, keys of 192 bits"},
    {"aes-256", "AES, keys of 256 bits"},         {"cast5-128", "CAST5, keys of 128 bits"},
    {"serpent-128", "Serpent, keys of 128 bits"}, {"serpent-192", "Serpent, keys of 192 bits"},
    {"serpent-256", "Serpent, keys of 256 bits"}, {"twofish-128", "Twofish, keys of 128 bits"},
    {"twofish-192", "Twofish, keys of 192 bits"}, {"twofish-256", "Twofish, keys of 256 bits"},
};
constexpr Absent kCipherAbsent[] = {{"des", kNoCipher}, {"3des", kNoCipher}, {"sm4", kNoCipher}};
constexpr EnumValue kModeValues[] = {
    {"ecb", "each block alone; shows equal blocks"},
    {"cbc", "each block depends on those before it"},
    {"xts", "made for disks; two keys"},
    {"ctr", "a counter; only for data that is written once"},
};
constexpr EnumValue kIvValues[] = {
    {"plain", "the sector's number, 32 bits"},
    {"plain64", "the sector's number, 64 bits"},
    {"essiv", "the sector's number, encrypted"},
};
constexpr EnumValue kHashValues[] = {
    {"md5", "MD5; broken"},
    {"sha1", "SHA-1; broken"},
    {"sha224", "SHA-2, 224 bits"},
    {"sha256", "SHA-2, 256 bits"},
    {"sha384", "SHA-2, 384 bits"},
    {"sha512", "SHA-2, 512 bits"},
    {"ripemd160", "RIPEMD, 160 bits"},
};
constexpr Absent kHashAbsent[] = {{"sm3", "not in this build: this hash is not built"}};
constexpr EnumValue kSlotStateValues[] = {
    {"active", "a passphrase is put into a key slot"},
    {"inactive", "key slots are erased"},
};

constinit const Type kBlockFormat =
    enum_type("QCryptoBlockFormat", "How block devices are encrypted.", kBlockFormatValues);
constinit const Type kQcow2Format =
    enum_type("BlockdevQcow2EncryptionFormat", "How a qcow2 image is encrypted.", kQcow2FormatValues);
constinit const Type kCipher =
    enum_type("QCryptoCipherAlgorithm", "Ciphers with their key sizes.", kCipherValues, kCipherAbsent);
constinit const Type kMode = enum_type("QCryptoCipherMode", "How a cipher is used on a sector.", kModeValues);
constinit const Type kIv =
    enum_type("QCryptoIVGenAlgorithm", "Where a sector's initialisation vector comes from.", kIvValues);
constinit const Type kHash = enum_type("QCryptoHashAlgorithm", "Hashes.", kHashValues, kHashAbsent);
constinit const Type kSlotState =
    enum_type("QCryptoBlockLUKSKeyslotState", "What becomes of key slots.", kSlotStateValues);

// --- options of opening

constexpr Member kKeySecretMembers[] = {
    optional("key-secret", kStr, "", "id of the secret object that holds the passphrase; mandatory"),
};
constinit const Type kOptionsQcow =
    struct_type("QCryptoBlockOptionsQCow", "A disk encrypted the old way.", kKeySecretMembers);
constinit const Type kOptionsLuks = struct_type("QCryptoBlockOptionsLUKS", "A LUKS volume.", kKeySecretMembers);

constexpr Member kQcow2EncryptionMembers[] = {required("format", kQcow2Format, "as the image says")};
constexpr Variant kQcow2EncryptionVariants[] = {{"aes", &kOptionsQcow}, {"luks", &kOptionsLuks}};

// --- options of creation

constexpr Member kCreateLuksMembers[] = {
    optional("cipher-alg", kCipher, "aes-256", "the cipher"),
    optional("cipher-mode", kMode, "xts", "how it is used on a sector"),
    optional("ivgen-alg", kIv, "plain64", "where initialisation vectors come from"),
    optional("ivgen-hash-alg", kHash, "sha256 for essiv", "hash of essiv"),
    optional("hash-alg", kHash, "sha256", "hash of the passphrase"),
    optional("iter-time", kInt, "2000", "milliseconds that one try of a passphrase takes on this machine"),
};
constinit const Type kCreateLuks =
    derived_type("QCryptoBlockCreateOptionsLUKS", "A LUKS volume to be made.", kOptionsLuks, kCreateLuksMembers);
constexpr Member kCreateMembers[] = {required("format", kBlockFormat, "how the data is encrypted")};
constexpr Variant kCreateVariants[] = {{"qcow", &kOptionsQcow}, {"luks", &kCreateLuks}};

// --- key slots

constexpr Member kAmendLuksMembers[] = {
    required("state", kSlotState, "what becomes of the key slots chosen"),
    optional("new-secret", kStr, "", "id of the secret with the passphrase for an activated slot"),
    optional("old-secret", kStr, "", "id of the secret with the passphrase of the slots to be erased"),
    optional("keyslot", kInt, "the first free one", "number of the slot, 0 to 7"),
    optional("iter-time", kInt, "2000", "milliseconds that one try of the new passphrase takes on this machine"),
    optional("secret", kStr, "the one the image was opened with", "id of a secret that opens the image now"),
};
constinit const Type kAmendLuks =
    struct_type("QCryptoBlockAmendOptionsLUKS", "A change of key slots.", kAmendLuksMembers);
constexpr Member kAmendMembers[] = {required("format", kBlockFormat, "how the data is encrypted")};
constexpr Variant kAmendVariants[] = {{"luks", &kAmendLuks}};

// --- what queries tell

constexpr Member kSlotInfoMembers[] = {
    required("active", kBool, "a passphrase is in it"),
    optional("iters", kInt, "", "iterations of the key derivation"),
    optional("stripes", kInt, "", "pieces the key is split into"),
    required("key-offset", kInt, "where its key material begins in the LUKS area"),
};
constinit const Type kSlotInfo = struct_type("QCryptoBlockInfoLUKSSlot", "A key slot.", kSlotInfoMembers);
constinit const Type kSlotInfoList = array_of(kSlotInfo);
constexpr Member kInfoLuksMembers[] = {
    required("cipher-alg", kCipher, "the cipher"),
    required("cipher-mode", kMode, "how it is used on a sector"),
    required("ivgen-alg", kIv, "where initialisation vectors come from"),
    optional("ivgen-hash-alg", kHash, "", "hash of essiv"),
    required("hash-alg", kHash, "hash of the passphrase"),
    required("payload-offset", kInt, "where the data would begin"),
    required("master-key-iters", kInt, "iterations of the check of the key"),
    required("uuid", kStr, "name of the volume"),
    required("slots", kSlotInfoList, "the key slots"),
};
constinit const Type kInfoLuks = struct_type("QCryptoBlockInfoLUKS", "A LUKS volume.", kInfoLuksMembers);
constexpr Member kQcow2InfoMembers[] = {required("format", kQcow2Format, "how the data is encrypted")};
constexpr Variant kQcow2InfoVariants[] = {{"aes", nullptr}, {"luks", &kInfoLuks}};

}  // namespace

constinit const Type kBlockdevQcow2Encryption = union_type("BlockdevQcow2Encryption", "How a qcow2 image is decrypted.",
                                                           kQcow2EncryptionMembers, "format", kQcow2EncryptionVariants);
constinit const Type kCryptoBlockCreateOptions =
    union_type("QCryptoBlockCreateOptions", "How a new image is encrypted.", kCreateMembers, "format", kCreateVariants);
constinit const Type kCryptoBlockAmendOptions = union_type(
    "QCryptoBlockAmendOptions", "A change of how an image is encrypted.", kAmendMembers, "format", kAmendVariants);
constinit const Type kQcow2EncryptionInfo = union_type(
    "ImageInfoSpecificQCow2Encryption", "How the image is encrypted.", kQcow2InfoMembers, "format", kQcow2InfoVariants);

namespace {
constexpr const Type* kTypes[] = {
    &kBlockFormat,
    &kQcow2Format,
    &kCipher,
    &kMode,
    &kIv,
    &kHash,
    &kSlotState,
    &kOptionsQcow,
    &kOptionsLuks,
    &kBlockdevQcow2Encryption,
    &kCreateLuks,
    &kCryptoBlockCreateOptions,
    &kAmendLuks,
    &kCryptoBlockAmendOptions,
    &kSlotInfo,
    &kInfoLuks,
    &kQcow2EncryptionInfo,
};
}  // namespace

constinit const Module kCryptoModule = {.types = kTypes};

}  // namespace gantry::schema
